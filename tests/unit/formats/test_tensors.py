"""Whatever a tensor is made of, reading a part of it gives what slicing the whole would, and reads no more than that."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import hf_to_meta
from hypothesis import given, settings
from hypothesis import strategies as st

import tunelib.formats.tensors as module
import tunelib.formats.tensors as tensors
from tunelib.errors import FormatError
from tunelib.formats.tensors import (
    Piece,
    Region,
    StoredTensor,
    TensorInfo,
    blocks_of,
    blocks_of_bytes,
    bounds_of,
    same_bits,
    shape_of,
    to_halves,
    to_pairs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
START = 24  # bytes before the tensor in its file


@st.composite
def shapes_with_parts(draw: st.DrawFn, min_dims: int = 0) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=min_dims, max_size=3)))
    part = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        begin = draw(st.integers(0, size))
        part.append(slice(begin, draw(st.integers(begin, size))))
    return shape, tuple(part)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every element another number."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def write_region(path: Path, tensor: torch.Tensor) -> Region:
    path.write_bytes(b"x" * START + bytes(b"".join(map(bytes, blocks_of_bytes(tensor)))))
    return Region(path, START, tensor.dtype, tuple(tensor.shape))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@given(
    case=shapes_with_parts(), dtype=st.sampled_from(DTYPES), min_column_bytes=st.sampled_from([1, 8, 1 << 12]), chunk_bytes=st.sampled_from([1, 64])
)
@settings(deadline=None, max_examples=150)
def test_any_part_of_a_region_is_that_part_of_the_tensor(
    tmp_path_factory: Any, case: Any, dtype: torch.dtype, min_column_bytes: int, chunk_bytes: int
):
    (shape, part), path = case, tmp_path_factory.getbasetemp() / "region"
    tensor = numbered(shape, dtype)
    region = write_region(path, tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "MIN_COLUMN_BYTES", min_column_bytes)
        patch.setattr(tensors, "CHUNK_BYTES", chunk_bytes)
        assert equal(region.read(part), tensor[part])


@given(case=shapes_with_parts(min_dims=2), order=st.permutations([0, 1, 2]), step=st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_any_part_of_a_strided_region_is_that_part_of_the_view(tmp_path_factory: Any, case: Any, order: list[int], step: int) -> None:
    (shape, part), path = case, tmp_path_factory.getbasetemp() / "strided"
    memory = numbered((*sorted(shape, reverse=True), 2))
    write_region(path, memory)
    view = memory[::step].permute(*(dim for dim in order if dim < memory.ndim), *range(3, memory.ndim))
    region = Region(path, START, view.dtype, tuple(view.shape), view.stride())
    inside = tuple(slice(min(p.start, size), min(p.stop, size)) for p, size in zip(part, view.shape, strict=False))
    assert equal(region.read(inside), view[inside])


def test_expanded_tensor_is_read_from_the_few_bytes_that_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_region(path, numbered((3,)))
    assert torch.equal(Region(path, START, torch.float32, (4, 3), (0, 1)).read((slice(1, 3),)), numbered((3,)).expand(2, 3))


@pytest.mark.parametrize(
    ("part", "num_bytes"),
    [((slice(3, 7),), 4 * 4096 * 4), ((slice(3, 7), slice(1024, 3072)), 4 * 2048 * 4), ((slice(5, 5),), 0)],
    ids=["rows", "wide columns", "nothing"],
)
def test_no_more_than_the_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[slice, ...], num_bytes: int) -> None:
    region, counts, preadv = write_region(tmp_path / "file", torch.ones(64, 4096)), [], os.preadv

    def count(*words: Any) -> int:
        counts.append(preadv(*words))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    tensor = StoredTensor(TensorInfo("t", torch.float32, (128, 4096)), (Piece(region, (0, 0)), Piece(region, (64, 0))))
    assert tensor.read(part).shape == shape_of(part, (128, 4096))
    assert sum(counts) == num_bytes


def test_file_that_ends_too_early_or_is_gone_is_named(tmp_path: Path) -> None:
    region = write_region(tmp_path / "weights", numbered((4, 3)))
    (tmp_path / "weights").write_bytes((tmp_path / "weights").read_bytes()[:-1])
    assert torch.equal(region.read((slice(0, 3),)), numbered((4, 3))[:3])
    with pytest.raises(FormatError, match=r"weights is truncated: .* byte 24"):
        region.read()
    (tmp_path / "weights").unlink()
    with pytest.raises(FormatError, match=r"weights cannot be read: No such file"):
        region.read()


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, int], list[list[int]], tuple[slice, slice]]:
    """A matrix's shape, where it is cut along each dimension, and a part of it."""
    shape = (draw(st.integers(1, 24)), draw(st.integers(1, 12)))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return shape, cuts, (slice(*bounds[0]), slice(*bounds[1]))


def store_in_pieces(path: Path, tensor: torch.Tensor, cuts: list[list[int]], head_dim: int = 0) -> StoredTensor:
    pieces = []
    for top, bottom in zip(cuts[0], cuts[0][1:], strict=False):
        for left, right in zip(cuts[1], cuts[1][1:], strict=False):
            region = write_region(path.with_name(f"{path.name}-{top}-{left}"), tensor[top:bottom, left:right])
            pieces.append(Piece(region, (top, left)))
    return StoredTensor(TensorInfo("t", tensor.dtype, tuple(tensor.shape)), tuple(reversed(pieces)), head_dim)


@given(case=grids())
@settings(deadline=None, max_examples=100)
def test_any_part_of_a_tensor_in_pieces_is_that_part_of_the_whole(tmp_path_factory: Any, case: Any) -> None:
    shape, cuts, part = case
    whole = numbered(shape)
    stored = store_in_pieces(tmp_path_factory.getbasetemp() / "pieces", whole, cuts)
    assert torch.equal(stored.read(part), whole[part])
    assert torch.equal(stored.read(), whole)


@given(case=grids(), head_dim=st.sampled_from([2, 4, 6]))
@settings(deadline=None, max_examples=100)
def test_any_part_of_rows_in_pairs_is_that_part_of_the_rows_in_halves(tmp_path_factory: Any, case: Any, head_dim: int) -> None:
    (heads, columns), cuts, _ = case
    in_halves = numbered((heads * head_dim, columns))
    cuts = [[cut * head_dim for cut in cuts[0]], cuts[1]]  # files hold whole heads
    stored = store_in_pieces(tmp_path_factory.getbasetemp() / "pairs", to_pairs(in_halves, head_dim), cuts, head_dim)
    assert torch.equal(stored.read(), in_halves)
    for first in range(0, heads * head_dim, 3):  # parts that begin and end within heads
        part = (slice(first, min(first + head_dim + 1, heads * head_dim)), case[2][1])
        assert torch.equal(stored.read(part), in_halves[part])


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (4, 6)])
@pytest.mark.parametrize("rest", [(), (5,)], ids=["bias", "weight"])
def test_rows_move_as_an_independent_rule_moves_them(heads: int, head_dim: int, rest: tuple[int, ...]) -> None:
    rows = numbered((heads * head_dim, *rest))
    names = {"model.layers.0.self_attn.q_proj.weight": rows, "model.embed_tokens.weight": rows}
    in_pairs = hf_to_meta(names, heads, heads, head_dim)["layers.0.attention.wq.weight"]
    assert torch.equal(to_pairs(rows, head_dim), in_pairs)
    assert torch.equal(to_halves(in_pairs, head_dim), rows)


def test_bytes_are_row_major_and_not_copied_where_they_lie_so() -> None:
    for tensor in (numbered((3, 4)).T, numbered((2, 3), torch.bfloat16), torch.tensor(1.5), torch.empty(0, 4), numbered((6, 4))[1::2]):
        assert bytes(b"".join(map(bytes, blocks_of_bytes(tensor)))) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    tensor = torch.zeros(4)
    view = next(blocks_of_bytes(tensor))
    tensor.fill_(1.0)
    assert bytes(view) == bytes(b"".join(map(bytes, blocks_of_bytes(torch.ones(4)))))


def test_parts_have_plain_bounds() -> None:
    assert bounds_of((slice(None), slice(2)), (5, 6, 7)) == [(0, 5), (0, 2), (0, 7)]
    assert shape_of((slice(1, 3),), (5, 6)) == (2, 6)
    assert shape_of((), ()) == ()


# Blocks and bits


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (0, 3), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("most", [1, 6, 1 << 24])
def test_blocks_cover_a_tensor_once_and_are_no_larger_than_asked(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], most: int) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", most)
    seen = torch.zeros(shape)
    for part in blocks_of(shape):
        assert seen[part].numel() <= max(most, torch.Size(shape[1:]).numel())
        seen[part] += 1
    assert torch.equal(seen, torch.ones(shape))


def test_bits_are_the_same_but_for_nans() -> None:
    nan = float("nan")
    assert same_bits(torch.tensor([1.0, nan, 0.0]), torch.tensor([1.0, nan, 0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([1.0, nan]), torch.tensor([nan, nan]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
