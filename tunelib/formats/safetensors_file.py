"""One safetensors file: which tensors lie where in it, and writing one tensor after tensor.

The layout is eight bytes with the header's length, a JSON header, then each tensor's bytes, little-endian and row-major (the
safetensors format, section "Format").
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunelib.errors import FormatError
from tunelib.files import ChecksummedFile
from tunelib.formats.tensors import Region, TensorInfo, Untouched, blocks_of_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, Region]:
    """The tensors of a safetensors file in the order in which they lie there.

    Raises:
        FormatError: the file is missing, truncated or damaged, or holds a type that is not a floating-point one.
    """
    try:
        with safe_open(path, framework="pt") as checked:  # the library proves the header: offsets in bounds, without gaps
            names = checked.offset_keys()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise FormatError(f"{path} {'cannot be read' if os.path.exists(path) else 'does not exist'}") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as safetensors: {error}; if it was cut short, copy or download it again") from None
    regions = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise FormatError(f"{path}: {name} has type {entry['dtype']}; {', '.join(DTYPES)} are read")
        regions[name] = Region(path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return regions


class SafetensorsWriter:
    """Writes one safetensors file, tensor after tensor, in the order given at the start."""

    def __init__(self, file: ChecksummedFile, tensors: Iterable[TensorInfo]):
        self._file, self._expected = file, list(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in self._expected:
            header[info.name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.nbytes]}
            offset += info.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, tensor: Tensor | Untouched) -> None:
        """Write the next tensor."""
        info = self._expected.pop(0)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{info} expected, not {tensor.shape} {tensor.dtype}"
        for block in blocks_of_bytes(tensor):
            self._file.write(block)

    def finish(self) -> dict[str, int]:
        """All tensors are there; wait until the disk has them. Gives size and crc32 of the file."""
        assert not self._expected, f"{self._expected[0].name} was not written"
        return self._file.finish()
