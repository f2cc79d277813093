"""What we write, torch reads, and what torch writes, we read, without running or loading anything else that lies there."""

import os
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import legacy_bin, malicious_pickle
from torch import nn

from tunelib.errors import FormatError
from tunelib.files import ChecksummedFile, crc32_of
from tunelib.formats.tensors import TensorInfo
from tunelib.formats.torch_file import ALIGNMENT, TorchWriter, read_torch_file

TENSORS = {
    "b.second": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.first": torch.tensor([[1.5, float("nan")], [float("-inf"), -0.0]], dtype=torch.bfloat16),
    "half": torch.tensor([1.0, 65504.0], dtype=torch.float16),
    "precise": torch.tensor([1e-300], dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "ünïcode \"name\"": torch.ones(1),
    "large": torch.randn(500, 300),
}  # fmt: skip


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ChecksummedFile(path) as file:
        writer = TorchWriter(file, infos)
        for tensor in tensors.values():
            writer.write(tensor)
        return writer.finish()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape, bits(found[name])) == (tensor.dtype, tensor.shape, bits(tensor)), name


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    write(tmp_path / "model.pt", TENSORS)
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
    assert type(loaded) is OrderedDict
    check_same(loaded, TENSORS)


def test_tensors_loaded_from_our_file_share_no_memory(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", {"one": torch.ones(3), "two": torch.ones(3)})
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded["one"].fill_(2.0)
    assert torch.equal(loaded["two"], torch.ones(3))


def test_our_archive_is_whole_plain_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    described = write(path, TENSORS)
    content = path.read_bytes()
    assert described == {"size": len(content), "crc32": crc32_of(path)}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        records = {record.filename: record for record in archive.infolist()}
        assert records.keys() == {f"archive/{name}" for name in ("data.pkl", "byteorder", "version", *(f"data/{n}" for n in range(len(TENSORS))))}
        for number, tensor in enumerate(TENSORS.values()):
            record = records[f"archive/data/{number}"]
            name_length, extra_length = (int.from_bytes(content[record.header_offset + at :][:2], "little") for at in (26, 28))
            begin = record.header_offset + 30 + name_length + extra_length
            assert (record.compress_type, begin % ALIGNMENT) == (zipfile.ZIP_STORED, 0)
            assert content[begin : begin + record.file_size] == bits(tensor)


def test_strided_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", {"t": TENSORS["b.second"].T, "every second": TENSORS["large"][::2, ::3]})
    check_same(torch.load(tmp_path / "model.pt", weights_only=True), {"t": TENSORS["b.second"].T, "every second": TENSORS["large"][::2, ::3]})


@pytest.mark.parametrize(
    "wrap", [dict, OrderedDict, lambda held: {"model": held}, lambda held: {"state_dict": held, "epoch": 3, "args": {"lr": 0.1}}]
)
def test_we_read_what_torch_writes(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(TENSORS), tmp_path / "model.pt")
    check_same({name: region.read() for name, region in read_torch_file(tmp_path / "model.pt").items()}, TENSORS)


def test_we_read_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", TENSORS)
    check_same({name: region.read() for name, region in read_torch_file(tmp_path / "model.pt").items()}, TENSORS)


def test_views_of_one_storage_are_read_each_for_itself(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": whole,
        "rows": whole[1:3],
        "columns": whole[:, 2:4],
        "turned": whole.T,
        "thinned": whole[::2, ::3],
        "wide": whole[0].expand(3, 6),
    }
    torch.save(views, tmp_path / "model.pt")
    found = read_torch_file(tmp_path / "model.pt")
    check_same({name: region.read() for name, region in found.items()}, views)
    part = (slice(1, 2), slice(0, 2))
    assert all(torch.equal(found[name].read(part), view[part]) for name, view in views.items())


def test_what_is_no_tensor_is_left_out_and_a_parameter_is_one(tmp_path: Path) -> None:
    torch.save({"weight": nn.Parameter(torch.ones(2)), "steps": 3, "name": "x"}, tmp_path / "model.pt")
    assert list(read_torch_file(tmp_path / "model.pt")) == ["weight"]


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    marker = malicious_pickle(tmp_path / "model.bin", legacy=legacy)
    with pytest.raises(FormatError, match=r"model\.bin is (refused: besides tensors it holds (builtins\.)?exec|not a file of torch\.save)"):
        read_torch_file(tmp_path / "model.bin")
    assert not marker.exists()


def test_file_from_before_torch_1_6_is_refused_with_the_way_out(tmp_path: Path) -> None:
    legacy_bin(tmp_path / "model.bin", TENSORS)
    with pytest.raises(FormatError, match=r"model\.bin .* before torch 1\.6: load it with torch\.load and save it again"):
        read_torch_file(tmp_path / "model.bin")


def rezip(path: Path, compression: int = zipfile.ZIP_STORED, byteorder: bytes = b"little") -> None:
    """Write an archive anew, as zipfile does."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, byteorder if name.endswith("/byteorder") else content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: rezip(path, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: rezip(path, byteorder=b"big"), "not little-endian"),
        (rezip, "not laid out as torch"),  # without the alignment that torch reckons with
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged or truncated"),
        (lambda path: path.write_bytes(b"PK"), "damaged or truncated"),
        (lambda path: path.write_bytes(b""), "not a file of torch"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "not a file of torch"),
        (lambda path: torch.save([torch.ones(2)], path), "mapping from names to tensors"),
        (lambda path: torch.save({}, path), "mapping from names to tensors"),
        (lambda path: torch.save({3: torch.ones(2)}, path), "mapping from names to tensors"),
        (lambda path: torch.save(torch.ones(2), path), "mapping from names to tensors"),
        (lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "not laid out as torch"),
        (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "sparse or quantized"),
        (os.unlink, "does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=[
        *("compressed", "big-endian", "moved", "truncated", "cut in half", "only the mark", "empty", "text", "a list", "no tensors"),
        *("numbers as names", "a bare tensor", "meta tensor", "sparse tensor", "missing", "folder"),
    ],
)
def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(TENSORS, path)
    change(path)
    with pytest.raises(FormatError, match=rf"model\.pt.*({words})"):
        read_torch_file(path)


def test_writer_holds_its_caller_to_the_plan(tmp_path: Path) -> None:
    with ChecksummedFile(tmp_path / "x") as file:
        writer = TorchWriter(file, [TensorInfo("a", torch.float32, (2,))])
        with pytest.raises(AssertionError, match="was not written"):
            writer.finish()
        with pytest.raises(AssertionError, match="expected"):
            writer.write(torch.ones(3))


def test_file_that_was_broken_off_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    with ChecksummedFile(tmp_path / "model.pt") as file:
        writer = TorchWriter(file, [TensorInfo("a", torch.float32, (2,)), TensorInfo("b", torch.float32, (2,))])
        writer.write(torch.ones(2))
    del writer
    with pytest.raises(FormatError, match="damaged or truncated"):
        read_torch_file(tmp_path / "model.pt")


def test_pickle_of_ours_names_nothing_but_tensors(tmp_path: Path) -> None:
    write(tmp_path / "model.pt", TENSORS)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        pickled = archive.read("archive/data.pkl")
    allowed = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
        f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double")
    }
    assert {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")} == allowed
