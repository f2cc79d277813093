"""Open a checkpoint, whatever form it has: one call that looks at the path and says what lies there, before a tensor is read.

Whoever has the result sees a model in Hugging Face's names and layout (law 7), and the form that it is stored in, so that the same
form can be written again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunelib import files
from tunelib.errors import FormatError
from tunelib.formats.form import Entry, Form
from tunelib.formats.found import CONFIG_FILE, DCP_METADATA, PARAMS_FILE, Found, look_into
from tunelib.formats.meta import count_rows, join_parts, looks_tied
from tunelib.formats.params import parse_params
from tunelib.formats.safetensors_file import DTYPES
from tunelib.formats.tensors import Piece, StoredTensor, TensorInfo, Where, blocks_of, find_gaps, name_of, same_bits
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import family_of, parse_config
from tunelib.model.families.family import Family
from tunelib.parallel.reduce import deal

# What training checkpoints hold beside the model, by the first part of the name.
TRAINING_STATE = ("optimizer", "rng", "lr_scheduler", "train_state", "dataloader")
MOST_PROBLEMS = 8


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint that was looked at.

    Attributes:
        path: what was opened, a folder or a file; folder: where config and tokenizer lie.
        fields: the model as a config.json says it.
        tensors: its weights by Hugging Face name; a head that is stored and tied is among them.
        skipped: stored names that are no weights.
        says: what the config is called in messages.
    """

    path: Path
    folder: Path
    form: Form
    fields: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    skipped: tuple[str, ...] = ()
    says: str = "its config"

    def read(self, name: str, where: Where = ()) -> Tensor:
        """A weight in Hugging Face's layout, or a part of it; a tied head is the embedding."""
        return self.find(name).read(where)

    def find(self, name: str) -> StoredTensor:
        """Where a weight lies; a tied head is the embedding."""
        return self.tensors[name if name in self.tensors else family_of(self.config).embedding]

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The model's own weights, without a tied head, in the order of the model."""
        return {name: self.tensors[name].info for name in expected_shapes(self.config) if name in self.tensors}

    @property
    def sentence(self) -> str:
        """What this is, in a few words."""
        inside = "folder with a " if self.form.kind == "torch" and self.path.is_dir() else ""
        return f"{inside}{NAMES[self.form.kind]} {self.path}"


NAMES = {"hf": "Hugging Face folder", "meta": "Meta folder", "dcp": "DCP folder", "torch": "torch file", "gguf": "GGUF file"}


@cache
def expected_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """The weights of a model and their shapes, without a tied head."""
    return {name: parameter.shape for name, parameter in build_on_meta(config, torch.float32).named_parameters()}


def open_checkpoint(path: Path, fields: dict[str, Any] | None = None) -> StoredModel:
    """Look at a checkpoint: what the model is, and where each weight lies. Only headers are read.

    Args:
        fields: of a config.json, for a checkpoint that does not say itself what the model is.

    Raises:
        FormatError: no weights, a missing or damaged file, an index and files that disagree, or a model that is not built.
    """
    found = look_into(path)
    kind, folder = found.kind, path if path.is_dir() else path.parent
    names = dict.fromkeys([*found.chunks, *(name for stored in found.partition.values() for name in stored)])
    fields, where = _find_fields(kind, folder, fields, found)
    config = parse_config(fields, where)
    family = family_of(config)
    prefix, is_meta = _find_naming(names, family, path)
    hf_names, skipped = _translate(names, prefix, is_meta, family, path)
    expected = _expect(config, len(hf_names), path, where)
    tensors: dict[str, StoredTensor] = {}
    entries: dict[str, list[Entry]] = {file: [] for file in found.partition}
    for stored_name, name in hf_names.items():
        head_dim = family.rotary_head_dim(name, config) if is_meta else 0
        holding = {file: stored[stored_name] for file, stored in found.partition.items() if stored_name in stored}
        if found.chunks:
            pieces = found.chunks[stored_name]
        elif kind == "meta" and len(found.partition) > 1:
            shape_of_tied = expected[family.embedding] if name == family.head else None
            pieces = join_parts(path, stored_name, [*holding.items()], expected.get(name, shape_of_tied), head_dim)
        else:
            pieces = [Piece(stored, (0,) * len(stored.shape)) for stored in holding.values()]
        shape = tuple(max(ends) for ends in zip(*(map(sum, zip(piece.begin, piece.stored.shape, strict=True)) for piece in pieces), strict=True))
        tensors[name] = StoredTensor(TensorInfo(name, pieces[0].stored.dtype, shape), tuple(pieces), head_dim)
        begins = {id(piece.stored): piece.begin for piece in pieces}
        for file, stored in holding.items():
            begin = begins.get(id(stored), (0,) * len(shape))
            part = tuple(slice(first, first + size) for first, size in zip(begin, stored.shape, strict=True)) if stored.shape != shape else ()
            entries[file].append(Entry(TensorInfo(stored_name, stored.dtype, stored.shape), name, part, head_dim))
    return StoredModel(path, folder, Form(kind, entries, found.index, is_meta, prefix), fields, config, tensors, skipped)


def check_files(stored: StoredModel) -> None:
    """Hold the files with weights against the manifest, where there is one.

    Where the ranks of a run call it together, each looks at its share: one of them may be the only one to raise.

    Raises:
        FormatError: naming each file that is not what it was; CheckpointError: the manifest cannot be read.
    """
    if files.has_manifest(stored.folder):
        entries = files.read_manifest(stored.folder)["files"]
        names = {*stored.form.files, DCP_METADATA}
        if damage := files.find_damage(stored.folder, entries, deal(sorted(name for name in entries if name in names or name.endswith(".distcp")))):
            raise FormatError("; ".join(damage))


def check_model(stored: StoredModel) -> None:
    """Prove that a checkpoint holds exactly the weights of its model.

    Where the ranks of a run call it together, each compares its share of a tied head: one of them may be the only one to raise.

    Raises:
        FormatError: missing or unexpected tensors, wrong shapes or types, the first of them by name; or a tied head that differs from the embedding.
    """
    expected = expected_shapes(stored.config)
    family, found = family_of(stored.config), dict(stored.tensors)
    if stored.config.tie_word_embeddings and family.head in found and family.embedding in found:
        head, embedding = found[family.head], found[family.embedding]
        blocks = deal(list(blocks_of(head.info.shape)))
        is_same = (head.info.dtype, head.info.shape) == (embedding.info.dtype, embedding.info.shape)
        if not (is_same and all(same_bits(head.read(part), embedding.read(part)) for part in blocks)):
            raise FormatError(f"{stored.path}: {stored.says} says tie_word_embeddings, but {family.head} differs from {family.embedding}")
        del found[family.head]
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    types = {name: tensor.info.dtype for name, tensor in found.items() if tensor.info.dtype not in DTYPES.values()}
    problems += [f"{name} has type {name_of(dtype)}, which is not one of floating-point weights" for name, dtype in types.items()]
    for name, shape in expected.items():
        if name in found and found[name].info.shape != tuple(shape):
            problems.append(f"{name} has shape {list(found[name].info.shape)} instead of {list(shape)}")
        elif name in found:
            problems += [f"{name} {problem}" for problem in find_gaps(found[name])]
    if problems:
        more = f" (and {len(problems) - MOST_PROBLEMS} more)" if len(problems) > MOST_PROBLEMS else ""
        raise FormatError(f"{stored.path} does not fit {stored.says}: {'; '.join(problems[:MOST_PROBLEMS])}{more}")


def read_fields(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; raises FormatError."""
    return files.read_json(folder / CONFIG_FILE, FormatError, f"does not exist: is {folder} a model folder?")


# What the model is, and what its tensors are called


def _expect(config: ModelConfig, num_stored: int, path: Path, where: str) -> Mapping[str, torch.Size]:
    """`expected_shapes` of a config that a stranger wrote; raises FormatError for sizes that no model has."""
    if config.num_hidden_layers > num_stored:
        raise FormatError(f"{path} does not fit {where}: num_hidden_layers = {config.num_hidden_layers}, but only {num_stored} tensors are stored")
    try:
        return expected_shapes(config)
    except (RuntimeError, TypeError) as error:  # torch counts in 64 bits
        raise FormatError(f"{where}: a model of these sizes cannot be built: {str(error).splitlines()[0]}") from None


def _find_fields(kind: str, folder: Path, given: dict[str, Any] | None, found: Found) -> tuple[dict[str, Any], str]:
    """The fields of a config.json, and where they come from. Meta folders go by params.json, others by config.json where both are."""
    order = (PARAMS_FILE, CONFIG_FILE) if kind == "meta" else (CONFIG_FILE, PARAMS_FILE)
    name = next((name for name in order if (folder / name).is_file()), None)
    if name == CONFIG_FILE:
        return read_fields(folder), str(folder / CONFIG_FILE)
    if name == PARAMS_FILE:
        params = files.read_json(folder / PARAMS_FILE, FormatError)
        where = str(folder / PARAMS_FILE)
        fields = parse_params(params, count_rows(params, found, where), where)
        return fields | {"tie_word_embeddings": looks_tied(found)}, where
    if given is not None:
        return given, "the given config"
    needed = PARAMS_FILE if kind == "meta" else CONFIG_FILE
    raise FormatError(
        f"{folder} has no {needed}: what model is it? Put one there, or name a folder that has one (--like); in training [model] can say it"
    )


def _find_naming(names: Iterable[str], family: Family, path: Path) -> tuple[str, bool]:
    """What stands before every weight's name, and whether the names are Meta's; told by the embedding, which every model has."""
    meta_name = family.to_meta_name(family.embedding)
    for name in sorted(names, key=len):
        if f".{name}".endswith(f".{family.embedding}"):
            return name.removesuffix(family.embedding), False
        if meta_name and f".{name}".endswith(f".{meta_name}"):
            return name.removesuffix(meta_name), True
    if any(".lora_" in name for name in names):
        raise FormatError(f"{path} holds adapters and no model; adapters are started from with lora.adapter_path, which takes a PEFT folder")
    known = f"neither {family.embedding} nor {meta_name}" if meta_name else f"no {family.embedding}"
    raise FormatError(f"{path} holds {known}: its names are not known")


def _translate(names: Iterable[str], prefix: str, is_meta: bool, family: Family, path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Stored name → Hugging Face name; and what is known to be no weight. A name that is not known stays as it is.

    Raises:
        FormatError: two names of one weight.
    """
    weights: dict[str, str] = {}
    skipped, beside = [], []
    for stored in names:
        inner = stored.removeprefix(prefix)
        if not stored.startswith(prefix):
            beside.append(stored)
        elif inner.split(".")[0] in TRAINING_STATE or any(f".{inner}".endswith(f".{ending}") for ending in family.derived):
            skipped.append(stored)
        else:
            weights[stored] = (family.to_hf_name(inner) or inner) if is_meta else inner
    of_weight: dict[str, str] = {}
    for stored, name in [*weights.items(), *((stored, family.to_hf_name(stored) or stored) for stored in beside)]:
        other = of_weight.setdefault(name, stored)
        if other != stored:
            raise FormatError(f"{path} holds {name} twice, as {other} and as {stored}")
    return weights, (*skipped, *beside)
