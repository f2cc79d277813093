"""Open a checkpoint, whatever form it has: one call that looks at the path and says what lies there, before a tensor is read.

Whoever has the result sees a model in Hugging Face's names and layout (law 7), and the form that it is stored in, so that the same
form can be written again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tunelib import files
from tunelib.errors import FormatError
from tunelib.formats.found import CONFIG_FILE, PARAMS_FILE, Found, look_into
from tunelib.formats.params import parse_params
from tunelib.formats.safetensors_file import DTYPES
from tunelib.formats.tensors import Piece, Stored, StoredTensor, TensorInfo, Where
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import family_of, parse_config

# What training checkpoints hold beside the model, by the first part of the name.
TRAINING_STATE = ("optimizer", "rng", "lr_scheduler", "train_state", "dataloader")
MOST_PROBLEMS = 8


@dataclass(frozen=True)
class Entry:
    """One tensor as a file holds it.

    Attributes:
        info: under its stored name.
        source: the Hugging Face name of the weight that it is, or is a part of.
        where: which part.
        head_dim: above 0, its rows lie in Meta's order, by heads of so many rows.
    """

    info: TensorInfo
    source: str
    where: Where = ()
    head_dim: int = 0


@dataclass(frozen=True)
class Form:
    """How a model is laid out in files.

    Attributes:
        kind: "hf", "meta", "dcp" or "torch".
        files: file name → what it holds, in order.
        index: the JSON that says which file holds which tensor, where there is one (kind "hf").
        is_meta: whether names and rotary pairs are Meta's.
    """

    kind: str
    files: dict[str, list[Entry]]
    index: dict[str, Any] | None = None
    is_meta: bool = False


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint that was looked at.

    Attributes:
        path: what was opened, a folder or a file; folder: where config and tokenizer lie.
        fields: the model as a config.json says it.
        tensors: its weights by Hugging Face name; a head that is stored and tied is among them.
        skipped: stored names that are no weights.
    """

    path: Path
    folder: Path
    form: Form
    fields: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    skipped: tuple[str, ...] = ()

    def read(self, name: str, where: Where = ()) -> Tensor:
        """A weight in Hugging Face's layout, or a part of it; a tied head is the embedding."""
        return self.tensors[name if name in self.tensors else family_of(self.config).EMBEDDING].read(where)

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The model's own weights, without a tied head, in the order of the model."""
        return {name: self.tensors[name].info for name in expected_shapes(self.config) if name in self.tensors}

    @property
    def sentence(self) -> str:
        """What this is, in a few words."""
        return f"{NAMES[self.form.kind]} {self.path}"


NAMES = {"hf": "Hugging Face folder", "meta": "Meta folder", "dcp": "DCP folder", "torch": "torch file", "gguf": "GGUF file"}


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
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
    hf_names, skipped = _translate(names, prefix, is_meta, family)
    expected = expected_shapes(config)
    tensors: dict[str, StoredTensor] = {}
    entries: dict[str, list[Entry]] = {file: [] for file in found.partition}
    for stored_name, name in hf_names.items():
        head_dim = family.rotary_head_dim(name, config) if is_meta else 0
        holding = {file: stored[stored_name] for file, stored in found.partition.items() if stored_name in stored}
        if found.chunks:
            pieces = found.chunks[stored_name]
        elif kind == "meta" and len(found.partition) > 1:
            shape_of_tied = expected[family.EMBEDDING] if name == family.HEAD else None
            pieces = _join(path, stored_name, [*holding.items()], expected.get(name, shape_of_tied), head_dim)
        else:
            pieces = [Piece(stored, (0,) * len(stored.shape)) for stored in holding.values()]
        shape = tuple(max(ends) for ends in zip(*(map(sum, zip(piece.begin, piece.stored.shape, strict=True)) for piece in pieces), strict=True))
        tensors[name] = StoredTensor(TensorInfo(name, pieces[0].stored.dtype, shape), tuple(pieces), head_dim)
        begins = {id(piece.stored): piece.begin for piece in pieces}
        for file, stored in holding.items():
            begin = begins.get(id(stored), (0,) * len(shape))
            part = tuple(slice(first, first + size) for first, size in zip(begin, stored.shape, strict=True)) if stored.shape != shape else ()
            entries[file].append(Entry(TensorInfo(stored_name, stored.dtype, stored.shape), name, part, head_dim))
    return StoredModel(path, folder, Form(kind, entries, found.index, is_meta), fields, config, tensors, skipped)


def check_model(stored: StoredModel, expected: dict[str, torch.Size] | None = None) -> None:
    """Prove that a checkpoint holds exactly the weights of its model.

    Args:
        expected: the model's parameters, a tied head left out, where they are not those of the checkpoint's own config.

    Raises:
        FormatError: missing or unexpected tensors, wrong shapes or types, the first of them by name; or a tied head that differs from the embedding.
    """
    expected = expected or expected_shapes(stored.config)
    family, found = family_of(stored.config), dict(stored.tensors)
    if stored.config.tie_word_embeddings and family.HEAD in found and family.EMBEDDING in found:
        if not _equal(stored.tensors[family.HEAD], stored.tensors[family.EMBEDDING]):
            raise FormatError(f"{stored.path}: the config says tie_word_embeddings, but {family.HEAD} differs from {family.EMBEDDING}")
        del found[family.HEAD]
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    types = {name: str(tensor.info.dtype).removeprefix("torch.") for name, tensor in found.items() if tensor.info.dtype not in DTYPES.values()}
    problems += [f"{name} has type {own_type}, which is not one of floating-point weights" for name, own_type in types.items()]
    for name, shape in expected.items():
        if name in found and found[name].info.shape != tuple(shape):
            problems.append(f"{name} has shape {list(found[name].info.shape)} instead of {list(shape)}")
        elif name in found and (volume := sum(torch.Size(piece.stored.shape).numel() for piece in found[name].pieces)) != shape.numel():
            problems.append(f"{name} is stored in pieces of {volume} elements in all instead of {shape.numel()}")
        elif name in found and len({piece.begin for piece in found[name].pieces}) != len(found[name].pieces):
            problems.append(f"{name} has two pieces at the same place")
    if problems:
        more = f" (and {len(problems) - MOST_PROBLEMS} more)" if len(problems) > MOST_PROBLEMS else ""
        raise FormatError(f"{stored.path} does not fit its config: {'; '.join(problems[:MOST_PROBLEMS])}{more}")


def read_fields(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; raises FormatError."""
    return files.read_json(folder / CONFIG_FILE, FormatError, f"does not exist: is {folder} a model folder?")


# What the model is, and what its tensors are called


def _find_fields(kind: str, folder: Path, given: dict[str, Any] | None, found: Found) -> tuple[dict[str, Any], str]:
    """The fields of a config.json, and where they come from. Meta folders go by params.json, others by config.json where both are."""
    order = (PARAMS_FILE, CONFIG_FILE) if kind == "meta" else (CONFIG_FILE, PARAMS_FILE)
    name = next((name for name in order if (folder / name).is_file()), None)
    if name == CONFIG_FILE:
        return read_fields(folder), str(folder / CONFIG_FILE)
    if name == PARAMS_FILE:
        params = files.read_json(folder / PARAMS_FILE, FormatError)
        where = str(folder / PARAMS_FILE)
        fields = parse_params(params, _count_rows(params, found, where), where)
        return fields | {"tie_word_embeddings": _is_tied(found)}, where
    if given is not None:
        return given, "the given config"
    needed = PARAMS_FILE if kind == "meta" else CONFIG_FILE
    raise FormatError(f"{folder} has no {needed}: what model is it? Put one there, or name a folder that has one (--like), or the size ([model])")


def _count_rows(params: dict[str, Any], found: Found, where: str) -> int:
    """Rows of the embedding: the vocabulary, which params.json often leaves out."""
    shapes = [stored.shape for held in found.partition.values() for name, stored in held.items() if name.endswith("tok_embeddings.weight")]
    shapes += [piece.stored.shape for name, pieces in found.chunks.items() if name.endswith("tok_embeddings.weight") for piece in pieces[-1:]]
    if not shapes or len(shapes[0]) != 2:
        raise FormatError(f"{where}: the weights have no tok_embeddings.weight")
    if found.chunks:
        pieces = next(pieces for name, pieces in found.chunks.items() if name.endswith("tok_embeddings.weight"))
        return max(piece.begin[0] + piece.stored.shape[0] for piece in pieces)
    (rows, width), dim = shapes[0], params.get("dim")
    if width * len(shapes) == dim:  # divided by columns
        return rows
    if isinstance(dim, int) and width != dim:
        count = f"each of {len(shapes)} files" if len(shapes) > 1 else "the only file"
        raise FormatError(f"{where}: dim = {dim}, but tok_embeddings.weight is {width} wide in {count}: is a file missing?")
    return sum(shape[0] for shape in shapes)


def _is_tied(found: Found) -> bool:
    """Whether a model with Meta's names uses its embedding as head: params.json does not say, so the weights do."""

    def tensors(ending: str) -> list[tuple[Stored, tuple[int, ...]]]:
        chunks = [(piece.stored, piece.begin) for name, pieces in found.chunks.items() if name.endswith(ending) for piece in pieces]
        return chunks or [(stored, ()) for held in found.partition.values() for name, stored in held.items() if name.endswith(ending)]

    heads, embeddings = tensors("output.weight"), tensors("tok_embeddings.weight")
    if not heads:
        return True
    if [(head.shape, begin) for head, begin in heads] != [(embedding.shape, begin) for embedding, begin in embeddings]:
        return False  # divided otherwise, as no tied model is
    return all(_equal(head, embedding) for (head, _), (embedding, _) in zip(heads, embeddings, strict=True))


def _equal(one: Any, other: Any) -> bool:
    """Whether two stored tensors are equal; they are read in blocks of rows, up to the first difference."""
    shapes = [item.info.shape if isinstance(item, StoredTensor) else item.shape for item in (one, other)]
    step = max(1, (1 << 22) // max(1, shapes[0][-1]))
    return shapes[0] == shapes[1] and all(
        torch.equal(one.read((slice(first, first + step),)), other.read((slice(first, first + step),))) for first in range(0, shapes[0][0], step)
    )


def _find_naming(names: Iterable[str], family: ModuleType, path: Path) -> tuple[str, bool]:
    """What stands before every weight's name, and whether the names are Meta's; told by the embedding, which every model has."""
    for name in sorted(names, key=len):
        if f".{name}".endswith(f".{family.EMBEDDING}"):
            return name.removesuffix(family.EMBEDDING), False
        if f".{name}".endswith(f".{family.to_meta_name(family.EMBEDDING)}"):
            return name.removesuffix(family.to_meta_name(family.EMBEDDING)), True
    raise FormatError(f"{path} holds neither {family.EMBEDDING} nor {family.to_meta_name(family.EMBEDDING)}: its names are not known")


def _translate(names: Iterable[str], prefix: str, is_meta: bool, family: ModuleType) -> tuple[dict[str, str], tuple[str, ...]]:
    """Stored name → Hugging Face name; and what is known to be no weight. A name that is not known stays as it is."""
    weights, skipped = {}, []
    for stored in names:
        inner = stored.removeprefix(prefix)
        beside = not stored.startswith(prefix) or inner.split(".")[0] in TRAINING_STATE
        if beside or any(f".{inner}".endswith(f".{ending}") for ending in family.DERIVED):
            skipped.append(stored)
        else:
            weights[stored] = (family.to_hf_name(inner) or inner) if is_meta else inner
    return weights, tuple(skipped)


def _join(path: Path, name: str, holding: list[tuple[str, Stored]], wanted_shape: torch.Size | None, head_dim: int) -> list[Piece]:
    """The pieces of a tensor in Meta's model-parallel files, by the shapes in the files and of the model.

    Raises:
        FormatError: copies that differ, or shapes that do not make up the tensor, or cut a head in two.
    """
    (first_file, first), *others = holding
    own, count = first.shape, len(holding)
    if wanted_shape is None:  # not part of the model, as `check_model` will say
        return [Piece(first, (0,) * len(own))]
    wanted = tuple(wanted_shape)
    if all(part.shape == own for _, part in others) and len(own) == len(wanted):
        if own == wanted:  # each file has all of it
            for file, part in others:
                if not torch.equal(part.read(), first.read()):
                    whole = f"all of it, {list(own)} by the model's config"
                    raise FormatError(f"{path / file}: {name} differs from that of {first_file}, though each file should hold {whole}")
            return [Piece(first, (0,) * len(own))]
        for dim in range(len(own)):
            divided = (*own[:dim], own[dim] * count, *own[dim + 1 :])
            if divided == wanted and not (head_dim and own[0] % head_dim):
                begins = (tuple(own[dim] * number if axis == dim else 0 for axis in range(len(own))) for number in range(count))
                return [Piece(part, begin) for (_, part), begin in zip(holding, begins, strict=True)]
    raise FormatError(f"{path}: {name} has shape {list(own)} in each of {count} files, which does not make up {list(wanted)}")
