"""DCP folders, tensor by tensor: where each chunk lies, and writing a folder without holding the model.

A ``.distcp`` file is a row of small files of `torch.save`, one for each chunk of a tensor; ``.metadata`` says which is where. torch's
own converters hold the whole model; here a chunk is read from where it lies, and only the part that is asked for.
"""

import io
import os
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tunelib.checkpoint.dcp_reader import SafeReader, Window
from tunelib.errors import CheckpointError, FormatError
from tunelib.files import ChecksummedFile
from tunelib.formats.tensors import Piece, Region, TensorInfo, Untouched, Where
from tunelib.formats.torch_file import read_layout, region_of, write_tensor


@dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor: a file of ``torch.save`` inside a ``.distcp`` file."""

    path: Path
    start: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, where: Where = ()) -> Tensor:
        """The chunk, or its part at ``where``; raises FormatError."""
        return self._region.read(where)

    def locate(self) -> Region:
        """Where the chunk's bytes lie; raises FormatError."""
        return self._region

    @cached_property
    def _region(self) -> Region:
        try:
            with open(self.path, "rb", buffering=0) as file:
                tensor = read_layout(io.BufferedReader(Window(file, self.start, self.length)), self.path)
        except OSError as error:
            raise FormatError(f"{self.path} cannot be read: {error.strerror}") from None
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (self.dtype, self.shape):
            raise FormatError(f"{self.path} does not hold at byte {self.start} what .metadata says")
        return region_of(tensor, self.path, self.start)


def open_chunks(folder: Path) -> dict[str, list[Piece]]:
    """Every tensor of a DCP folder by its stored name, and its chunks.

    Raises:
        FormatError: the metadata cannot be read or asks for code to be run, or a file that it names is missing.
    """
    try:
        found = _list_chunks(folder, SafeReader(folder).read_metadata())
    except CheckpointError as error:
        raise FormatError(str(error)) from None
    except (AttributeError, TypeError, ValueError, OverflowError) as error:  # unpickled, but not whole
        raise FormatError(f"{folder / '.metadata'} cannot be read, it is damaged: {error}") from None
    for file in sorted({piece.stored.path for pieces in found.values() for piece in pieces if isinstance(piece.stored, Chunk)}):
        if not os.path.isfile(file):
            raise FormatError(f"{file} is missing, which .metadata names")
    return found


def _list_chunks(folder: Path, metadata: Metadata) -> dict[str, list[Piece]]:
    places = metadata.storage_data or {}
    found: dict[str, list[Piece]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue  # a value that is no tensor: training state of others
        for chunk in entry.chunks:
            place = places.get(MetadataIndex(name, chunk.offsets))
            if place is None or getattr(place, "transform_descriptors", None):
                raise FormatError(f"{folder}: .metadata does not say where {name} at {list(chunk.offsets)} lies as plain bytes")
            numbers = (place.offset, place.length, *chunk.offsets, *chunk.sizes)
            if not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers) or len(chunk.offsets) != len(chunk.sizes):
                raise ValueError(f"{name} has a chunk at {chunk.offsets} of {chunk.sizes}")
            stored = Chunk(folder / place.relative_path, place.offset, place.length, entry.properties.dtype, tuple(chunk.sizes))
            found.setdefault(name, []).append(Piece(stored, tuple(chunk.offsets)))
    return found


class DcpWriter:
    """Writes one ``.distcp`` file, tensor after tensor, each in one chunk; `dcp_metadata` makes the folder of it."""

    def __init__(self, file: ChecksummedFile, name: str, tensors: list[TensorInfo]):
        self._file, self._name, self._expected = file, name, list(tensors)
        self.places: dict[str, tuple[TensorInfo, _StorageInfo]] = {}

    def write(self, tensor: Tensor | Untouched) -> None:
        """Write the next tensor."""
        info = self._expected.pop(0)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{info} expected, not {tensor.shape} {tensor.dtype}"
        start = self._file.tell()
        write_tensor(self._file, tensor)
        self.places[info.name] = (info, _StorageInfo(self._name, start, self._file.tell() - start))

    def finish(self) -> dict[str, int]:
        """All tensors are there; wait until the disk has them. Gives size and crc32 of the file."""
        assert not self._expected, f"{self._expected[0].name} was not written"
        return self._file.finish()


def dcp_metadata(writers: list[DcpWriter]) -> bytes:
    """The content of ``.metadata`` for what the writers wrote; names flat, so that torch's converters keep them."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places, paths = {}, {}
    for writer in writers:
        for name, (info, place) in writer.places.items():
            size = torch.Size(info.shape)
            begin = torch.Size([0] * len(size))
            properties = TensorProperties(dtype=info.dtype)
            tensors[name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(begin, size)])
            places[MetadataIndex(name, begin, 0)] = place
            paths[name] = (name,)
    return pickle.dumps(Metadata(tensors, planner_data=paths, storage_data=places, storage_meta=StorageMeta()))
