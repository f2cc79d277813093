"""Give a spread model its weights, from whatever they are stored in: the one call that training and every tool make."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tunelib.checkpoint.dcp_reader import SafeReader, load_tensors
from tunelib.config import read_written
from tunelib.config.schema import Model
from tunelib.config.sizes import SIZES
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError
from tunelib.files import MANIFEST, find_damage, read_manifest
from tunelib.formats.hf import EMBEDDING, HEAD, ExportPlan, HfFolder, check_names, find_companions, open_hf_folder, plan_export, read_config
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, draw_weight
from tunelib.model.families import hf_config, llama, parse_config
from tunelib.parallel.reduce import deal, local

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class Weights:
    """Where a model's first weights come from: a Hugging Face folder, a DCP folder, or nowhere (they are drawn).

    Attributes:
        config: the model that they are for.
        sentence: for the opening lines.
        num_stored_rows: rows of the embedding and head that are stored; the model may have more.
    """

    config: ModelConfig
    sentence: str
    num_stored_rows: int
    hf: HfFolder | None = None
    dcp: Path | None = None


def check_weights_folder(initial_load_path: str) -> None:
    """Say how to get a model, before anything else looks into a folder that is not there; raises FormatError."""
    folder = Path(initial_load_path)
    if initial_load_path and not (folder / "config.json").is_file() and (folder / "export" / "config.json").is_file():
        raise FormatError(f"checkpoint.initial_load_path = {initial_load_path!r} is a run folder; its weights are in {folder / 'export'}")
    if initial_load_path and not folder.is_dir():
        raise FormatError(f"checkpoint.initial_load_path = {initial_load_path!r} is not a folder; scripts/download.py fetches one from the Hub")


def find_tokenizer_folder(tokenizer_path: str, initial_load_path: str) -> Path | None:
    """Where the tokenizer is: as told, beside the weights, or where the run that wrote a step folder had it; None for none at all."""
    if tokenizer_path or not initial_load_path:
        return Path(tokenizer_path) if tokenizer_path else None
    folder = Path(initial_load_path)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) or not (folder / CONFIG_FILE).is_file():
        return folder
    written = read_written(folder / CONFIG_FILE)
    return find_tokenizer_folder(str(written.get("model.tokenizer_path", "")), str(written.get("checkpoint.initial_load_path", "")))


def find_weights(section: Model, initial_load_path: str, vocab_size: int, seq_len: int) -> Weights:
    """Know the model: from the folder that it is loaded from, or from [model].

    Args:
        vocab_size: the tokenizer's, for a model whose own is not given, or that is to grow with it (model.resize_embeddings).
        seq_len: tokens per row, for a model whose longest context is not given.

    Raises:
        FormatError: a folder that is not one, or whose config.json and weights do not fit together.
    """
    if not initial_load_path:
        config = parse_config(_fields_of(section, vocab_size, seq_len), "[model]")
        config = replace(config, vocab_size=max(config.vocab_size, vocab_size)) if section.resize_embeddings else config
        return Weights(config, "weights drawn from training.seed", config.vocab_size)
    check_weights_folder(initial_load_path)
    folder = Path(initial_load_path)
    config = parse_config(read_config(folder), str(folder / "config.json"))
    num_stored_rows = config.vocab_size
    grown = ""
    if section.resize_embeddings and vocab_size > num_stored_rows:
        config = replace(config, vocab_size=vocab_size)
        grown = f", the embedding grown from {num_stored_rows} to {vocab_size} rows"
    if (folder / ".metadata").is_file():
        unverified = "" if (folder / MANIFEST).is_file() else ", unverified: it has no manifest"
        return Weights(config, f"weights from the DCP folder {folder}{unverified}{grown}", num_stored_rows, dcp=folder)
    return Weights(config, f"weights from the Hugging Face folder {folder}{grown}", num_stored_rows, hf=open_hf_folder(folder))


def check_weights(model: Decoder, weights: Weights) -> None:
    """Prove, before storage is allocated, that the weights fit the model; raises FormatError.

    Files that a manifest speaks of are verified, dealt out over the ranks: one of them may be the only one to raise.
    """
    if weights.hf is not None:
        _check_files(weights.hf.folder, set(weights.hf.partition))
        expected = {name: _stored_shape(name, parameter.shape, weights) for name, parameter in model.named_parameters()}
        check_names(weights.hf, expected, model.config.tie_word_embeddings)
    if weights.dcp is not None:
        _check_files(weights.dcp, None)
        held = SafeReader(weights.dcp).read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            size, expected_size = getattr(held.get(name), "size", None), _stored_shape(name, parameter.shape, weights)
            if size != expected_size:
                raise FormatError(f"{weights.dcp}: {name} is {'missing' if size is None else f'{list(size)} instead of {list(expected_size)}'}")


def _check_files(folder: Path, names: set[str] | None) -> None:
    """Verify a folder's files, or those of these names, where it has a manifest."""
    if (folder / MANIFEST).is_file():
        entries = read_manifest(folder)["files"]
        if damage := find_damage(folder, entries, deal(sorted(name for name in entries if names is None or name in names))):
            raise FormatError("; ".join(damage))


def give_weights(model: Decoder, weights: Weights, seed: int) -> None:
    """Fill every parameter, each rank its own shards only. Collective for a DCP folder.

    Rows that an embedding or a head has beyond those stored become the mean of the stored ones.
    """
    grown: dict[str, Tensor] = {}
    if weights.dcp is not None:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        grown = {
            name: torch.empty(stored, dtype=parameter.dtype)
            for name, parameter in parameters.items()
            if (stored := _stored_shape(name, parameter.shape, weights)) != parameter.shape
        }
        load_tensors(parameters | grown, weights.dcp)
    for name, parameter in model.named_parameters():
        where = _own_slices(parameter)
        if name in grown or _stored_shape(name, parameter.shape, weights) != parameter.shape:
            assert grown or weights.hf is not None, "a drawn model has no stored rows"
            whole = grown[name] if grown else weights.hf.read(name)  # type: ignore[union-attr]  # see above
            fill = whole.mean(dim=0, dtype=torch.float32).to(whole.dtype).expand(parameter.shape[0] - len(whole), -1)
            local(parameter.detach()).copy_(torch.cat([whole, fill])[where])
        elif weights.dcp is None:
            part = weights.hf.read(name, where) if weights.hf else draw_weight(model.config, name, parameter.shape, seed)[where]
            local(parameter.detach()).copy_(part)


def _stored_shape(name: str, shape: torch.Size, weights: Weights) -> torch.Size:
    """The shape of a parameter where it is stored: an embedding and a head may have fewer rows there."""
    return torch.Size((weights.num_stored_rows, *shape[1:])) if name in (EMBEDDING, HEAD) else shape


def plan_export_of(
    model: Decoder,
    weights: Weights,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    stop_ids: frozenset[int],
    dtype: torch.dtype | None,
) -> ExportPlan:
    """How the model's weights will leave: in the form they came in, with the tokenizer that was used.

    Args:
        chat_template: the template that was trained with, where it is not the tokenizer's own.
        stop_ids: ids that end an answer, for generation_config.json.
        dtype: the type asked for, or None for the one they came in.
    """
    parameters = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    special_ids = tokenizer.special_ids if tokenizer else {}
    config = weights.hf.config if weights.hf is not None else hf_config(weights.config) | special_ids
    if weights.num_stored_rows != weights.config.vocab_size:
        config = {**config, "vocab_size": weights.config.vocab_size}
    source, folder = weights.hf.folder if weights.hf else None, tokenizer.folder if tokenizer else None
    companions = find_companions(source, folder, config, chat_template, stop_ids) | (tokenizer.files_to_write() if tokenizer else {})
    return plan_export(parameters, config, weights.hf, dtype, companions)


def _own_slices(parameter: Tensor) -> tuple[slice, ...]:
    """The part of the whole tensor that lies on this rank."""
    if not isinstance(parameter, DTensor):
        return (slice(None),) * parameter.ndim
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


def _fields_of(section: Model, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """[model] as the fields of a config.json: a named size, what is given besides, and defaults where there is no size."""
    own = {
        name: value
        for name, value in asdict(section).items()
        if value is not None and name not in ("flavor", "tokenizer_path", "resize_embeddings", "rope_scaling")
    }
    if section.rope_scaling.rope_type != "default":
        own["rope_scaling"] = asdict(section.rope_scaling)
    defaults = {"vocab_size": vocab_size + vocab_size % 2, "max_position_embeddings": seq_len, "rms_norm_eps": 1e-5}
    return {"architectures": [llama.ARCHITECTURE], **(SIZES[section.flavor] if section.flavor else defaults), **own}
