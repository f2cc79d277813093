"""Tensors where they lie: bytes in a file, and Hugging Face tensors put together from them, whole or any part.

Every format becomes the same thing here: a tensor in Hugging Face's layout is a `StoredTensor`, made of pieces (one; or one for each
model-parallel file, or for each chunk of a DCP folder), and reading a part of it reads the bytes of that part and no more.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tunelib.errors import FormatError

Where = tuple[slice, ...]
"""A part of a tensor: a slice with plain bounds for each leading dimension; () is the whole."""
Bounds = tuple[tuple[int, int], ...]
"""First index and the one after the last, by dimension."""
MIN_COLUMN_BYTES = 1 << 12
"""Columns narrower than this are cut from whole rows: reading so little saves nothing."""
CHUNK_BYTES = 1 << 26
PASSING_BYTES = 1 << 19  # stays in the processor's cache, as what is read in large blocks does not
CUTTING_BYTES = 1 << 21  # of whole rows, where a block is put together of several reads
BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * math.prod(self.shape)


class Stored(Protocol):
    """Something stored that can be read in parts."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, where: Where = ()) -> Tensor:
        """The tensor, or its part at ``where``, as memory of its own."""
        ...

    def locate(self) -> "Region":
        """Where its bytes lie."""
        ...


@dataclass(frozen=True)
class Region:
    """A tensor's bytes in a file, little-endian.

    Attributes:
        offset: bytes before it in the file.
        strides: elements from one index to the next, by dimension; None for row-major.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def read(self, where: Where = ()) -> Tensor:
        """The tensor, or its part at ``where``.

        Raises:
            FormatError: the file ends too early, or cannot be read.
        """
        with self._opened() as file:
            if self.strides is not None:
                last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
                spanned = torch.empty(last + 1 if math.prod(self.shape) else 0, dtype=self.dtype)
                return _read_into(file, self.offset, spanned).as_strided(self.shape, self.strides)[where].clone()
            return self._read_rows(file, bounds_of(where, self.shape))

    def locate(self) -> "Region":
        """It is here."""
        return self

    def part(self, where: Where) -> "Region | None":
        """The region of a part; None if its bytes do not lie in one row."""
        bounds = bounds_of(where, self.shape)
        if self.strides is not None or any(bound != (0, size) for bound, size in zip(bounds[1:], self.shape[1:], strict=True)):
            return None
        begin = bounds[0][0] * math.prod(self.shape[1:]) if bounds else 0
        return Region(self.path, self.offset + begin * self.dtype.itemsize, self.dtype, shape_of(where, self.shape))

    def pass_through(self, buffer: Tensor) -> Iterator[Tensor]:
        """The bytes of a row-major tensor, block after block, each in the beginning of a buffer; raises FormatError."""
        count = math.prod(self.shape) * self.dtype.itemsize
        with self._opened() as file:
            for begin in range(0, count, len(buffer)):
                yield _read_into(file, self.offset + begin, buffer[: min(len(buffer), count - begin)])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.RawIOBase]:
        try:
            with open(self.path, "rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise FormatError(f"{self.path} cannot be read: {error.strerror}") from None
        except EOFError:
            raise FormatError(f"{self.path} is truncated: it ends before the tensor at byte {self.offset} does") from None

    def _read_rows(self, file: io.RawIOBase, bounds: list[tuple[int, int]]) -> Tensor:
        """Whole rows in one go; columns row by row, or cut from whole rows."""
        if not bounds:
            return _read_into(file, self.offset, torch.empty((), dtype=self.dtype))
        (first, last), rest = bounds[0], bounds[1:]
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        if all(bound == (0, size) for bound, size in zip(rest, row_shape, strict=True)):
            return _read_into(file, self.offset + first * row_bytes, torch.empty((last - first, *row_shape), dtype=self.dtype))
        part = torch.empty((last - first, *(end - begin for begin, end in rest)), dtype=self.dtype)
        if len(rest) == 1 and (rest[0][1] - rest[0][0]) * self.dtype.itemsize >= MIN_COLUMN_BYTES:
            for number in range(last - first):
                _read_into(file, self.offset + (first + number) * row_bytes + rest[0][0] * self.dtype.itemsize, part[number])
            return part
        columns = (slice(None), *(slice(*bound) for bound in rest))
        step = max(1, CHUNK_BYTES // max(row_bytes, 1))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            rows = _read_into(file, self.offset + begin * row_bytes, torch.empty((end - begin, *row_shape), dtype=self.dtype))
            part[begin - first : end - first] = rows[columns]
        return part


@dataclass(frozen=True)
class Piece:
    """Something stored, and the index in the whole tensor at which it begins."""

    stored: Stored
    begin: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in Hugging Face's layout, and what it is made of.

    Attributes:
        pieces: they cover the tensor, without overlap.
        head_dim: above 0, the pieces' rows lie in Meta's order, by heads of so many rows; see `to_halves`.
    """

    info: TensorInfo
    pieces: tuple[Piece, ...]
    head_dim: int = 0

    def read(self, where: Where = ()) -> Tensor:
        """The tensor, or its part at ``where``; no more than that is read, but for rows up to the borders of heads."""
        bounds = bounds_of(where, self.info.shape)
        if not self.head_dim:
            return self._gather(bounds)
        (first, last), rest = bounds[0], bounds[1:]
        begin = first // self.head_dim * self.head_dim
        end = math.ceil(last / self.head_dim) * self.head_dim
        return to_halves(self._gather([(begin, end), *rest]), self.head_dim)[first - begin : last - begin]

    def _gather(self, bounds: list[tuple[int, int]]) -> Tensor:
        """The part at these bounds as it lies in the pieces."""
        shape = tuple(last - first for first, last in bounds)
        whole: Tensor | None = None
        for piece in self.pieces:
            shared = [
                (max(first, begin), min(last, begin + size))
                for (first, last), begin, size in zip(bounds, piece.begin, piece.stored.shape, strict=True)
            ]
            if any(first >= last for first, last in shared):
                continue
            part = piece.stored.read(tuple(slice(first - begin, last - begin) for (first, last), begin in zip(shared, piece.begin, strict=True)))
            if part.shape == shape:
                return part
            whole = torch.empty(shape, dtype=self.info.dtype) if whole is None else whole
            whole[tuple(slice(low - first, high - first) for (low, high), (first, _) in zip(shared, bounds, strict=True))] = part
        return torch.empty(shape, dtype=self.info.dtype) if whole is None else whole


@dataclass(frozen=True)
class Untouched:
    """A tensor, or its part at ``where``, that is written as it is stored: it passes block by block, and is never whole in memory."""

    stored: StoredTensor
    where: Where = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.where, self.stored.info.shape)

    def blocks(self) -> Iterator[memoryview]:
        """Its bytes, row-major, a block at a time; a block is overwritten by the next. Raises FormatError."""
        pieces = self.stored.pieces
        region = pieces[0].stored.locate().part(self.where) if len(pieces) == 1 and not self.stored.head_dim else None
        if region is not None:
            for block in region.pass_through(torch.empty(PASSING_BYTES, dtype=torch.uint8)):
                yield memoryview(block.numpy().data)
            return
        row_elements = CUTTING_BYTES // self.dtype.itemsize
        first, *rest = [slice(*bound) for bound in bounds_of(self.where, self.stored.info.shape)]
        step = max(1, row_elements // max(1, math.prod(self.stored.info.shape[1:])))
        for begin in range(first.start, first.stop, step):
            yield _bytes_of(self.stored.read((slice(begin, min(begin + step, first.stop)), *rest)))


def find_gaps(tensor: StoredTensor) -> list[str]:
    """What keeps pieces from making up their tensor: another type, a gap, an overlap; a few words each."""
    pieces, shape = tensor.pieces, tensor.info.shape
    if other := next((piece for piece in pieces if piece.stored.dtype != tensor.info.dtype), None):
        return [f"is {name_of(tensor.info.dtype)} in one place and {name_of(other.stored.dtype)} in another"]
    volume = sum(math.prod(piece.stored.shape) for piece in pieces)
    if volume != math.prod(shape):
        return [f"is stored in pieces of {volume} elements in all instead of {math.prod(shape)}"]
    filled = [piece for piece in pieces if math.prod(piece.stored.shape)]
    boxes = sorted(tuple((first, first + size) for first, size in zip(piece.begin, piece.stored.shape, strict=True)) for piece in filled)
    if len(boxes) < 2 or all(one[0][1] == other[0][0] for one, other in itertools.pairwise(boxes)):  # rows, one after the other, as FSDP saves them
        return []
    return ["is stored in pieces that overlap"] if any(overlap(*pair) for pair in itertools.combinations(boxes, 2)) else []


def overlap(one: Bounds, other: Bounds) -> bool:
    """Whether two parts of a tensor share an element."""
    return all(max(first[0], second[0]) < min(first[1], second[1]) for first, second in zip(one, other, strict=True))


def bounds_of(where: Where, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last-but-one index of a part, for every dimension."""
    padded = (*where, *(slice(None) for _ in shape[len(where) :]))
    return [part.indices(size)[:2] for part, size in zip(padded, shape, strict=True)]


def shape_of(where: Where, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(max(last - first, 0) for first, last in bounds_of(where, shape))


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads · head_dim, …), from Meta's order to Hugging Face's.

    Meta rotates neighbours, (0, 1), (2, 3), …; Hugging Face rotates row i with row i + head_dim / 2. So within each head the even
    rows come first, then the odd ones.
    """
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, (heads · head_dim, …), from Hugging Face's order to Meta's: the inverse of `to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def blocks_of(shape: tuple[int, ...]) -> Iterator[Where]:
    """A tensor in blocks of whole rows."""
    if not shape:
        yield ()
        return
    row = max(1, math.prod(shape[1:]))
    step = max(1, BLOCK_ELEMENTS // row)
    if 0 in shape:
        return
    for first in range(0, shape[0], step):
        yield (slice(first, min(first + step, shape[0])), *(slice(0, size) for size in shape[1:]))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type are equal bit for bit, but for the kind of NaN."""
    return not different_bits(one, other).any()


def different_bits(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one type and shape are not equal bit for bit; NaNs of two kinds are."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return (one.contiguous().view(whole) != other.contiguous().view(whole)) & ~(one.isnan() & other.isnan())


def name_of(dtype: torch.dtype) -> str:
    """The name of a type as configs write it."""
    return str(dtype).removeprefix("torch.")


def blocks_of_bytes(tensor: Tensor | Untouched) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major, in blocks; those of a contiguous one on the CPU are not copied."""
    if isinstance(tensor, Untouched):
        yield from tensor.blocks()
    else:
        yield _bytes_of(tensor.detach().cpu().contiguous())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _read_into(file: io.RawIOBase, offset: int, target: Tensor) -> Tensor:
    """Fill a contiguous tensor from a place in a file; raises EOFError where the file ends first."""
    view = _bytes_of(target)
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise EOFError
        done += count
    return target
