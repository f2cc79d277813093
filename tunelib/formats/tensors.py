"""Where weights come from and go to, tensor by tensor: slices of safetensors files, and a writer that holds one tensor at a time."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunelib.errors import FormatError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file in the order in which they lie there.

    Raises:
        FormatError: the file is missing, truncated or damaged, or holds a type that is not a floating-point one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            infos = []
            for name in file.offset_keys():
                piece = file.get_slice(name)
                if piece.get_dtype() not in SAFETENSORS_DTYPES:
                    raise FormatError(f"{path}: {name} has type {piece.get_dtype()}; {', '.join(SAFETENSORS_DTYPES)} are read")
                infos.append(TensorInfo(name, SAFETENSORS_DTYPES[piece.get_dtype()], tuple(piece.get_shape())))
            return infos
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as safetensors: {error}") from None


def read_slice(path: Path, name: str, where: tuple[slice, ...]) -> Tensor:
    """A part of one tensor; only its bytes are read from the disk."""
    with safe_open(path, framework="pt") as file:
        piece = file.get_slice(name)
        return piece[where] if where else piece[:] if piece.get_shape() else file.get_tensor(name)


class SafetensorsWriter:
    """Writes one safetensors file, tensor after tensor, in the order given at the start.

    The layout is eight bytes with the header's length, a JSON header, then each tensor's bytes, little-endian and row-major
    (the safetensors format, section "Format").
    """

    def __init__(self, file: BinaryIO, tensors: Iterable[TensorInfo]):
        self._file, self._expected = file, list(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in self._expected:
            end = offset + nbytes(info)
            header[info.name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor."""
        info = self._expected.pop(0)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{info} expected, not {tensor.shape} {tensor.dtype}"
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """All tensors are there; wait until the disk has them."""
        assert not self._expected, f"{self._expected[0].name} was not written"
        self._file.flush()
        os.fsync(self._file.fileno())


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data."""
    return info.dtype.itemsize * torch.Size(info.shape).numel()
