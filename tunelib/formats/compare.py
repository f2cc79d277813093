"""Is a checkpoint whole, and do two of them hold the same weights, whatever their forms?"""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tunelib import files
from tunelib.errors import CheckpointError, FormatError
from tunelib.formats.dcp import Chunk, Window
from tunelib.formats.found import TORCH_SUFFIXES
from tunelib.formats.source import StoredModel, check_model, expected_shapes
from tunelib.formats.tensors import blocks_of, different_bits, name_of
from tunelib.model.config import ModelConfig

NOT_COMPUTED = ("max_position_embeddings", "initializer_range")
"""What does not change the logits of a text; Meta's params.json has no key for it."""


def find_faults(stored: StoredModel, looked_at: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is wrong with a checkpoint, a sentence each: files against the manifest, tensors against the config, numbers that are not finite.

    Args:
        looked_at: called with the number of bytes after each tensor.
    """
    faults: list[str] = []
    try:
        if files.has_manifest(stored.folder):
            entries = files.read_manifest(stored.folder)["files"]
            faults += files.find_damage(stored.folder, entries, sorted(entries))
        check_model(stored)
    except (CheckpointError, FormatError) as error:
        faults.append(str(error))
    faults += [f"{path} is damaged: the checksum of its record {record} is not that of its bytes" for path, record in find_bad_records(stored)]
    for name, tensor in stored.tensors.items():
        try:
            num_bad = sum(int((~torch.isfinite(tensor.read(part))).sum()) for part in blocks_of(tensor.info.shape))
        except FormatError as error:
            faults.append(str(error))
            continue
        if num_bad:
            faults.append(f"{stored.path}: {name}: {num_bad} of {torch.Size(tensor.info.shape).numel()} numbers are not finite")
        looked_at(tensor.info.nbytes)
    return faults


def find_bad_records(stored: StoredModel) -> Iterator[tuple[Path, str]]:
    """Files of ``torch.save``, and chunks inside ``.distcp`` files, whose own checksums do not hold: the file, and the record.

    Where there is a manifest it has been looked at; safetensors files have no checksums of their own.
    """
    if files.has_manifest(stored.folder):
        return
    places = [(stored.folder / name, 0, 0) for name in stored.form.files if Path(name).suffix in TORCH_SUFFIXES]
    chunks = [piece.stored for tensor in stored.tensors.values() for piece in tensor.pieces]
    places += [(chunk.path, chunk.start, chunk.length) for chunk in chunks if isinstance(chunk, Chunk)]
    for path, start, length in places:
        with open(path, "rb", buffering=0) as file:
            inner = io.BufferedReader(Window(file, start, length or path.stat().st_size))
            try:
                record = zipfile.ZipFile(inner).testzip()
            except (OSError, zipfile.BadZipFile):
                record = "(its directory)"
        if record is not None:
            yield path, record


def find_difference(one: StoredModel, other: StoredModel, looked_at: Callable[[int], None] = lambda _: None) -> str:
    """The first difference between two checkpoints of any forms, weight by weight, or of what their configs say of the computation; "" for none."""
    if fields := different_fields(one.config, other.config, exempt=NOT_COMPUTED):
        return f"the configs differ: {'; '.join(fields)}"
    rounded = ""
    for name in expected_shapes(one.config):
        infos = [model.weights.get(name) for model in (one, other)]
        for model, info in zip((one, other), infos, strict=True):
            if info is None:
                return f"{name} is missing in {model.path}"
        first, second = infos
        assert first is not None
        assert second is not None
        if first.shape != second.shape:
            return f"{name} has shape {list(first.shape)} in {one.path} and {list(second.shape)} in {other.path}"
        narrow = min((first.dtype, second.dtype), key=lambda dtype: (dtype.itemsize, str(dtype)))
        for part in blocks_of(first.shape):
            left, right = one.read(name, part), other.read(name, part)
            differs = different_bits(left.to(narrow), right.to(narrow))
            if differs.any():
                place = [inner + begin.start for inner, begin in zip(differs.nonzero()[0].tolist(), part, strict=True)]
                distance = (left.double() - right.double())[differs].abs().max().item()
                return f"{name} differs, first at {place}, near there by up to {distance:.3g}"
        if first.dtype != second.dtype and not rounded:
            rounded = f"{name} is {name_of(first.dtype)} in {one.path} and {name_of(second.dtype)} in {other.path}"
        looked_at(first.nbytes + second.nbytes)
    return f"{rounded}; every value is the same once rounded" if rounded else ""


def different_fields(one: ModelConfig, other: ModelConfig, exempt: tuple[str, ...] = ()) -> list[str]:
    """What two configs say differently of the computation, a few words each."""
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in vars(one) if name not in exempt)
    return [f"{name} is {left} and {right}" for name, left, right in pairs if left != right]
