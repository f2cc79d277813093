"""Meta's form: what params.json leaves to the weights, and tensors that are divided over model-parallel files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunelib.errors import FormatError
from tunelib.formats.form import Entry, Form
from tunelib.formats.found import Found
from tunelib.formats.tensors import Piece, Stored, TensorInfo, same_bits, shape_of
from tunelib.model.config import ModelConfig
from tunelib.model.families import family_of

SAMPLE_ROWS = 64


def count_rows(params: dict[str, Any], found: Found, where: str) -> int:
    """Rows of the embedding: the vocabulary, which params.json often leaves out."""
    shapes = [stored.shape for held in found.partition.values() for name, stored in held.items() if name.endswith("tok_embeddings.weight")]
    shapes += [piece.stored.shape for name, pieces in found.chunks.items() if name.endswith("tok_embeddings.weight") for piece in pieces[-1:]]
    if not shapes or len(shapes[0]) != 2:
        raise FormatError(f"{where}: the weights have no tok_embeddings.weight")
    if found.chunks:
        pieces = next(pieces for name, pieces in found.chunks.items() if name.endswith("tok_embeddings.weight"))
        return max(piece.begin[0] + piece.stored.shape[0] for piece in pieces)
    (rows, width), dim = shapes[0], params.get("dim")
    if len(shapes) > 1 and width == dim and params.get("vocab_size") == rows:  # each file has all of it
        return rows
    if width * len(shapes) == dim:  # divided by columns
        return rows
    if isinstance(dim, int) and width != dim:
        count = f"each of {len(shapes)} files" if len(shapes) > 1 else "the only file"
        raise FormatError(f"{where}: dim = {dim}, but tok_embeddings.weight is {width} wide in {count}: is a file missing?")
    return sum(shape[0] for shape in shapes)


def looks_tied(found: Found) -> bool:
    """Whether a model with Meta's names seems to use its embedding as head: params.json does not say, so the weights do.

    Only the first rows are compared; `check_model` proves that all are the same.
    """

    def tensors(ending: str) -> list[tuple[Stored, tuple[int, ...]]]:
        chunks = [(piece.stored, piece.begin) for name, pieces in found.chunks.items() if name.endswith(ending) for piece in pieces]
        return chunks or [(stored, ()) for held in found.partition.values() for name, stored in held.items() if name.endswith(ending)]

    heads, embeddings = tensors("output.weight"), tensors("tok_embeddings.weight")
    if not heads or [(head.shape, begin) for head, begin in heads] != [(embedding.shape, begin) for embedding, begin in embeddings]:
        return False  # divided otherwise, as no tied model is
    first = tuple(slice(0, min(size, SAMPLE_ROWS)) for size in heads[0][0].shape[:1])
    return same_bits(heads[0][0].read(first), embeddings[0][0].read(first))


def join_parts(path: Path, name: str, holding: list[tuple[str, Stored]], wanted_shape: torch.Size | None, head_dim: int) -> list[Piece]:
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


def with_head(weights: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The weights with a head: in Meta's names there always is one, where embeddings are tied too."""
    family = family_of(config)
    return {**weights, family.head: weights.get(family.head) or replace(weights[family.embedding], name=family.head)}


def to_meta(entry: Entry, config: ModelConfig) -> Entry:
    """The same weight with Meta's name, its rotary rows in pairs."""
    family = family_of(config)
    name = family.to_meta_name(entry.source)
    if family.meta is None:
        raise FormatError(f"Meta's form has no names for {config.architecture}; take hf, torch, or dcp with Hugging Face's names")
    if name is None:
        raise FormatError(f"{entry.source} has no name in Meta's form")
    return replace(entry, info=replace(entry.info, name=name), head_dim=family.rotary_head_dim(entry.source, config))


def plan_meta(weights: Mapping[str, TensorInfo], config: ModelConfig, count: int) -> Form:
    """Meta's files: ``count`` of them, which divide every tensor but the norms.

    Raises:
        FormatError: the weights have no names in Meta's form, or do not divide.
    """
    family = family_of(config)
    files: dict[str, list[Entry]] = {f"consolidated.{number:02d}.pth": [] for number in range(count)}
    for name, info in with_head(weights, config).items():
        entry = to_meta(Entry(info, name), config)
        assert family.meta is not None, "or the weight had no name"
        dim, unit = family.meta.split(name, config)
        if dim is not None and info.shape[dim] % (count * unit):
            what = f"{info.shape[dim] // unit} heads" if unit > 1 else f"size {info.shape[dim]}"
            raise FormatError(f"--model_parallel {count}: {entry.info.name} has {what} along dimension {dim}, which do not divide by {count}")
        for number, entries in enumerate(files.values()):
            if dim is None or count == 1:
                entries.append(entry)
                continue
            size = info.shape[dim] // count
            where = tuple(slice(number * size, (number + 1) * size) if axis == dim else slice(0, length) for axis, length in enumerate(info.shape))
            entries.append(replace(entry, info=replace(entry.info, shape=shape_of(where, info.shape)), where=where))
    return Form("meta", files, is_meta=True)
