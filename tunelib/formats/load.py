"""Give a spread model its weights, from whatever they are stored in: the one call that training and every tool make."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tunelib.adapters import LORA_A, LORA_B, AdaptedLinear, draw_adapter, is_of_adapter, row_lengths
from tunelib.config import read_written
from tunelib.config.schema import Model
from tunelib.config.sizes import SIZES
from tunelib.data.tokenizer import TOKENIZER_FILES, Tokenizer
from tunelib.errors import FormatError
from tunelib.files import has_manifest
from tunelib.formats.export import plan_checkpoint
from tunelib.formats.fingerprint import checksum_of, fingerprint_of
from tunelib.formats.found import find_kind, says_what_model
from tunelib.formats.live import gather, is_cut_by_columns
from tunelib.formats.plan import Plan, Wish
from tunelib.formats.source import StoredModel, check_files, check_model, expected_shapes, open_checkpoint
from tunelib.formats.tensors import Region, TensorInfo, Where, bounds_of
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, draw_weight
from tunelib.model.families import hf_config, llama, parse_config
from tunelib.parallel.reduce import agreed, local
from tunelib.quantize import dequantize, quantize

RUN_CONFIG = "config.toml"


@dataclass(frozen=True)
class Weights:
    """Where a model's first weights come from: a checkpoint of any form, or nowhere (they are drawn).

    Attributes:
        config: the model that they are for.
        sentence: for the opening lines.
    """

    config: ModelConfig
    sentence: str
    stored: StoredModel | None = None


def check_weights_path(initial_load_path: str) -> None:
    """Say how to get a model, before anything else looks for one that is not there; raises FormatError."""
    if initial_load_path:
        try:
            find_kind(Path(initial_load_path))
        except FormatError as error:
            raise FormatError(f"checkpoint.initial_load_path: {error}") from None


def find_tokenizer_folder(tokenizer_path: str, initial_load_path: str) -> Path | None:
    """Where the tokenizer is: as told, beside the weights, or where the run that wrote a step folder had it; None for none at all."""
    if tokenizer_path or not initial_load_path:
        return Path(tokenizer_path) if tokenizer_path else None
    folder = Path(initial_load_path) if Path(initial_load_path).is_dir() else Path(initial_load_path).parent
    if any((folder / name).is_file() for name in TOKENIZER_FILES) or not (folder / RUN_CONFIG).is_file():
        return folder
    written = read_written(folder / RUN_CONFIG)
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
        return Weights(config, "weights drawn from training.seed")
    check_weights_path(initial_load_path)
    path = Path(initial_load_path)
    stored = open_checkpoint(path, None if says_what_model(path) else _fields_of(section, vocab_size, seq_len))
    config, grown = stored.config, ""
    if section.resize_embeddings and vocab_size > config.vocab_size:
        config = replace(config, vocab_size=vocab_size)
        grown = f", the embedding grown from {stored.config.vocab_size} to {vocab_size} rows"
    unverified = ", unverified: it has no manifest" if stored.form.kind == "dcp" and not has_manifest(path) else ""
    return Weights(config, f"weights from the {stored.sentence}{unverified}{grown}", stored)


def check_weights(weights: Weights) -> None:
    """Prove, before storage is allocated, that the weights fit the model; raises FormatError.

    Files that a manifest speaks of are verified, dealt out over the ranks: one of them may be the only one to raise.
    """
    if weights.stored is None:
        return
    check_files(weights.stored)
    check_model(weights.stored)


def fill(model: Decoder, weights: Weights, seed: int, adapter: Mapping[str, Region] | None, compute_dtype: torch.dtype) -> str:
    """Fill every parameter of a spread model, as `give_weights` says; the fingerprint of those that are frozen. Collective."""
    with agreed():
        checksums = give_weights(model, weights, seed, adapter, compute_dtype)
    if adapter is None:
        give_lengths_of_cut_rows(model, compute_dtype)
    return fingerprint_of(checksums)


def give_weights(
    model: Decoder, weights: Weights, seed: int, adapter: Mapping[str, Region] | None = None, compute_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Fill every parameter, each rank its own shards only.

    DoRA's lengths follow with `give_lengths_of_cut_rows`, where rows are cut.
    Rows that an embedding or a head has beyond those stored become the mean of the stored ones.

    Args:
        adapter: where the trained parameters come from, in place of fresh ones.
        compute_dtype: of the forward pass, where it is not that of the parameters.

    Returns:
        This rank's share of a checksum of each frozen weight, as it is stored; see `tunelib.formats.fingerprint`.
    """
    checksums: dict[str, int] = {}
    adapter = adapter or {}
    shapes = expected_shapes(model.config)
    for name, parameter in model.named_parameters():
        where, target = own_part(parameter), local(parameter.detach())
        if is_of_adapter(name):
            continue
        if parameter.dtype == torch.uint8:
            where = where[:1]  # whole rows, which are quantised
        if weights.stored is None:
            part = draw_weight(model.config, name, shapes[name], seed)[where]
        elif weights.stored.tensors[name].info.shape != tuple(shapes[name]):
            whole = weights.stored.read(name)
            fill = whole.mean(dim=0, dtype=torch.float32).to(whole.dtype).expand(shapes[name][0] - len(whole), -1)
            part = torch.cat([whole, fill])[where]
        else:
            part = weights.stored.read(name, where)
        target.copy_(quantize(part.to(target.device)) if parameter.dtype == torch.uint8 else part)
        if not parameter.requires_grad and is_first_copy(parameter):
            first, *rest = bounds_of(where, tuple(shapes[name]))
            stored_rows = weights.stored.tensors[name].info.shape[0] if weights.stored is not None else shapes[name][0]
            last = max(first[0], min(first[1], stored_rows))  # rows that were added here are not the base's
            checksums[name] = checksum_of(part[: last - first[0]], [(first[0], last), *rest])
    for module_name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            _give_adapter(module_name, module, seed, compute_dtype)
    for name, parameter in model.named_parameters():
        if name in adapter:
            local(parameter.detach()).copy_(adapter[name].read(own_part(parameter)))
    return checksums


def _give_adapter(module_name: str, module: AdaptedLinear, seed: int, compute_dtype: torch.dtype | None) -> None:
    """Fresh matrices; and for DoRA the lengths of the base's rows as it computes with them, each rank its own."""
    for mark, matrix in ((LORA_A, module.lora_A.weight), (LORA_B, module.lora_B.weight)):
        local(matrix.detach()).copy_(draw_adapter(module_name + mark, matrix.shape, seed)[own_part(matrix)])
    if module.lora_magnitude_vector is not None and not is_cut_by_columns(module.weight):
        _give_lengths(module, local(module.weight.detach()), compute_dtype)


def give_lengths_of_cut_rows(model: Decoder, compute_dtype: torch.dtype) -> None:
    """Begin DoRA's lengths where no rank has whole rows of the weight, which `give_weights` leaves out. Collective."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and module.lora_magnitude_vector is not None and is_cut_by_columns(module.weight):
            _give_lengths(module, gather(module.weight.detach())[own_part(module.lora_magnitude_vector)], compute_dtype)


def _give_lengths(module: AdaptedLinear, rows: Tensor, compute_dtype: torch.dtype | None) -> None:
    assert module.lora_magnitude_vector is not None
    dtype = compute_dtype or (module.lora_A.weight.dtype if module.is_quantized else rows.dtype)
    rows = dequantize(rows, dtype) if module.is_quantized else rows.to(dtype)
    local(module.lora_magnitude_vector.detach()).copy_(row_lengths(rows))


def plan_export_of(
    model: Decoder,
    weights: Weights,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    stop_ids: frozenset[int],
    dtype: torch.dtype | None,
    export_format: str = "auto",
) -> Plan:
    """How the model's weights will leave: in the form they came in, with the tokenizer that was used.

    Args:
        chat_template: the template that was trained with, where it is not the tokenizer's own.
        stop_ids: ids that end an answer, for generation_config.json.
        dtype: the type asked for, or None for the one they came in.
        export_format: the kind of folder, or "auto" for the one they came in.
    """
    stored = weights.stored
    kind = export_format if export_format != "auto" else stored.form.kind if stored is not None else "hf"
    leaving = {
        name: TensorInfo(name, dtype or (stored.tensors[name].info.dtype if stored else model.model.embed_tokens.weight.dtype), tuple(shape))
        for name, shape in expected_shapes(model.config).items()
    }
    fields = stored.fields if stored is not None else hf_config(weights.config)
    if stored is None or stored.form.kind == "meta":
        fields = (tokenizer.special_ids if tokenizer else {}) | fields
    if fields.get("vocab_size") != weights.config.vocab_size:
        fields = {**fields, "vocab_size": weights.config.vocab_size}
    form = stored.form if stored is not None and stored.form.kind == kind else None
    like = form if kind != "dcp" else None  # whose chunks follow the processes that wrote them
    wish = Wish(kind, meta_names=form.is_meta, prefix=form.prefix) if form is not None and kind == "dcp" else Wish(kind)
    return plan_checkpoint(wish, like, leaving, fields, stored.folder if stored else None, tokenizer, chat_template, stop_ids)


def is_first_copy(parameter: Tensor) -> bool:
    """Whether no lower rank holds the same part."""
    if not isinstance(parameter, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return all(place == 0 for place, placement in zip(coordinate, parameter.placements, strict=True) if isinstance(placement, Replicate))


def own_part(parameter: Tensor) -> Where:
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
