"""Files that ``torch.save`` makes, such as ``.pt``, ``.pth`` and ``.bin``: which tensors lie where in one, and writing one tensor after tensor.

Such a file is a zip archive of uncompressed records: ``data.pkl``, which says what the tensors are, and ``data/N`` with the bytes of
each storage. Only the first is unpickled, by torch's allow-list; the bytes are read from where they lie, or not at all.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from tunelib.errors import FormatError
from tunelib.files import ChecksummedFile
from tunelib.formats.tensors import Region, TensorInfo, Untouched, blocks_of_bytes

ALIGNMENT = 64
MOST_UNPICKLED_BYTES = 1 << 30  # of what is no tensor's: 200 bytes say what a tensor is
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name
ZIP64_BYTES = 20  # of the field in a local header that gives large sizes
SIZES_FOLLOW = 0x08  # the flag of a record with size and checksum behind its bytes
# The pickled name of each type's storage (torch/storage.py), which says the type.
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def read_torch_file(path: Path) -> dict[str, Region]:
    """The tensors of a file that holds a flat mapping from names to tensors, or one under the key "model" or "state_dict".

    Entries that are no tensors are left out.

    Raises:
        FormatError: the file is missing, damaged, of the form before torch 1.6, wants to run code, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = read_layout(file, path)
    except OSError as error:
        raise FormatError(f"{path} does not exist" if isinstance(error, FileNotFoundError) else f"{path} cannot be read: {error}") from None
    if isinstance(content, Mapping):
        for name in ("model", "state_dict"):
            content = content[name] if isinstance(content.get(name), Mapping) else content
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return {name: region_of(tensor, path, 0) for name, tensor in tensors.items()}
    raise FormatError(f"{path} does not hold a mapping from names to tensors")


def read_layout(file: IO[bytes], path: Path) -> Any:
    """What ``torch.save`` put into a file, with tensors on the meta device that know where their bytes lie.

    Args:
        path: for messages.

    Raises:
        FormatError: it cannot be read, wants to run code, or is laid out otherwise than torch lays out its files.
    """
    if file.read(2) != b"PK":
        raise FormatError(f"{path} is not a file of torch.save, or was made before torch 1.6: load it with torch.load and save it again")
    file.seek(0)
    try:
        places = _find_records(file)  # first: big-endian numbers end the process where torch meets them on the meta device
        file.seek(0)
        # On the meta device no bytes of tensors are read; torch notes each storage's place in the file.
        content = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise FormatError(
            f"{path} is refused: besides tensors it holds {asked[1] if asked else 'something'} that would be run while reading; nothing of it was run"
        ) from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise FormatError(f"{path} cannot be read, it is damaged or truncated: {str(error).split('. ')[0]}") from None
    for tensor in _list_tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise FormatError(f"{path} holds a sparse or quantized tensor; only plain ones are read")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.dtype.itemsize > storage.nbytes():
            raise FormatError(f"{path} holds a tensor of {tensor.numel()} numbers in {storage.nbytes()} bytes; only plain ones are read")
        if storage.nbytes() > places.get(storage._checkpoint_offset or 0, -1):  # torch works places out from what it knows of its own files
            raise FormatError(f"{path} is not laid out as torch.save does: load it with torch.load and save it again")
    return content


def _find_records(file: IO[bytes]) -> dict[int, int]:
    """Where the bytes of each record of an archive begin, and how many they are.

    What says which tensors there are is held against its checksum, which torch does not look at.

    Raises:
        ValueError: the archive was not stored plainly; BadZipFile: it is damaged.
    """
    places, num_unpickled = {}, 0
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            is_data = record.filename.split("/")[1:2] == ["data"]
            num_unpickled += 0 if is_data else record.file_size
            if num_unpickled > MOST_UNPICKLED_BYTES:
                raise ValueError(f"{record.filename} says that it has {record.file_size} bytes")
            content = b"" if is_data else archive.read(record)
            if record.filename.endswith("/byteorder") and content != b"little":
                raise ValueError("its numbers are not little-endian")
            file.seek(record.header_offset + LOCAL_HEADER_BYTES - 4)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            places[record.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length] = record.file_size
    return places


def _list_tensors(content: Any) -> list[Tensor]:
    """The tensors of nested mappings, each mapping looked at once: one may hold itself, or another many times over."""
    waiting, seen = [content], set[int]()
    tensors = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values()
    return tensors


def _place_of(tensor: Tensor) -> int:
    """Where its storage begins; torch.load notes it on the meta device (torch's notes on serialization)."""
    place = tensor.untyped_storage()._checkpoint_offset
    assert place is not None, "torch.load has not noted it"
    return place


def region_of(tensor: Tensor, path: Path, start: int) -> Region:
    """Where the bytes of a tensor of `read_layout` lie.

    Args:
        start: bytes in ``path`` before the file that was laid out.
    """
    strides = None if tensor.is_contiguous() else tensor.stride()
    return Region(path, start + _place_of(tensor) + int(tensor.storage_offset()) * tensor.dtype.itemsize, tensor.dtype, tuple(tensor.shape), strides)


class TorchWriter:
    """Writes a file that ``torch.load`` reads as an ordered dict, tensor after tensor, in the order given at the start.

    As in torch's own files each record begins at a multiple of 64 bytes, so that the file can be mapped into memory.
    """

    def __init__(self, file: ChecksummedFile, tensors: Iterable[TensorInfo]):
        self._file, self._expected, self._count = file, list(tensors), 0
        names = OrderedDict((info.name, _Named(_Storage(number, info), info.shape)) for number, info in enumerate(self._expected))
        self._archive = _Archive(file, names)

    def write(self, tensor: Tensor | Untouched) -> None:
        """Write the next tensor."""
        info = self._expected.pop(0)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{info} expected, not {tensor.shape} {tensor.dtype}"
        self._archive.add(f"data/{self._count}", blocks_of_bytes(tensor))
        self._count += 1

    def finish(self) -> dict[str, int]:
        """All tensors are there; wait until the disk has them. Gives size and crc32 of the file."""
        assert not self._expected, f"{self._expected[0].name} was not written"
        self._archive.finish()
        return self._file.finish()


def write_tensor(file: ChecksummedFile, tensor: Tensor | Untouched) -> None:
    """Append what ``torch.save`` makes of a single tensor."""
    info = TensorInfo("", tensor.dtype, tuple(tensor.shape))
    archive = _Archive(file, _Named(_Storage(0, info), info.shape))
    archive.add("data/0", blocks_of_bytes(tensor))
    archive.finish()


class _Archive:
    """The archive that torch.save makes, appended to a file, record after record.

    It is not seekable: sizes and checksums stand behind each record, as torch writes it too.
    """

    def __init__(self, file: ChecksummedFile, content: object):
        self._file = file
        self._begin = file.tell()
        self._zip = _Zip(cast("IO[bytes]", _Forward(file)), "w", zipfile.ZIP_STORED)
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(content)
        self.add("data.pkl", [pickled.getvalue()])
        self.add("byteorder", [b"little"])

    def finish(self) -> None:
        """Write what closes the archive."""
        self._zip.writestr("archive/version", b"3\n")
        self._zip.close()

    def add(self, name: str, content: Iterable[bytes | memoryview]) -> None:
        """Write a record, block after block; `zipfile` would do it with a checksum that takes as long as the writing."""
        assert self._zip.fp is not None
        record = zipfile.ZipInfo(f"archive/{name}")
        record.header_offset, record.flag_bits = self._file.tell() - self._begin, SIZES_FOLLOW
        padding = -(self._file.tell() + LOCAL_HEADER_BYTES + len(record.filename) + ZIP64_BYTES + 4) % ALIGNMENT
        record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        self._zip.fp.write(record.FileHeader(zip64=True))
        record.CRC = 0
        for block in content:
            self._zip.fp.write(block)
            record.CRC = crc32(block, record.CRC)
            record.file_size += len(block)
        record.compress_size = record.file_size
        self._zip.fp.write(struct.pack("<4sLQQ", b"PK\x07\x08", record.CRC, record.compress_size, record.file_size))
        self._zip.filelist.append(record)


class _Zip(zipfile.ZipFile):
    """A zip file that only `close` ends: one that was broken off writes no more, into a file that is closed by then."""

    def __del__(self) -> None:
        pass


class _Forward:
    """A file that can only be appended to, as far as `zipfile` sees."""

    def __init__(self, file: ChecksummedFile):
        self.write, self.flush = file.write, file.flush


class _Storage:
    """Stands for a storage where a file's tensors are named."""

    def __init__(self, number: int, info: TensorInfo):
        self.key, self.dtype, self.count = str(number), info.dtype, info.nbytes // info.dtype.itemsize


class _Named:
    """Pickles as a tensor of torch's own form."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self._storage, self._shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self._shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self._storage, 0, self._shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", STORAGES[value.dtype], value.key, "cpu", value.count) if isinstance(value, _Storage) else None
