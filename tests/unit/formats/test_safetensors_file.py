"""What we write is read by the safetensors library, and what it writes by us, byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunelib.errors import FormatError
from tunelib.files import ChecksummedFile, crc32_of
from tunelib.formats.safetensors_file import SafetensorsWriter, read_safetensors
from tunelib.formats.tensors import TensorInfo

TENSORS = {
    "b.second": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.first": torch.tensor([[1.5, float("nan")], [float("-inf"), -0.0]], dtype=torch.bfloat16),
    "half": torch.tensor([1.0, 65504.0], dtype=torch.float16),
    "precise": torch.tensor([1e-300], dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "ünïcode \"name\"": torch.ones(1),
}  # fmt: skip


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ChecksummedFile(path) as file:
        writer = SafetensorsWriter(file, infos)
        for tensor in tensors.values():
            writer.write(tensor)
        return writer.finish()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", TENSORS)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (loaded[name].dtype, loaded[name].shape, bits(loaded[name])) == (tensor.dtype, tensor.shape, bits(tensor))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read_safetensors(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, region in found.items():
        assert (region.dtype, region.shape) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
        assert bits(region.read()) == bits(TENSORS[name])
    assert torch.equal(found["b.second"].read((slice(1, 3), slice(2, 4))), TENSORS["b.second"][1:3, 2:4])


def test_tensors_are_named_in_the_order_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", TENSORS)
    filled = [name for name, tensor in TENSORS.items() if tensor.numel()]
    assert [name for name in read_safetensors(tmp_path / "model.safetensors") if name in filled] == filled


def test_strided_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"t": TENSORS["b.second"].T})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], TENSORS["b.second"].T)


def test_written_file_is_as_long_as_it_says(tmp_path: Path) -> None:
    described = write(tmp_path / "model.safetensors", TENSORS)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert len(content) == 8 + header + sum(tensor.nbytes for tensor in TENSORS.values())
    assert described == {"size": len(content), "crc32": crc32_of(tmp_path / "model.safetensors")}


@pytest.mark.parametrize("damage", ["truncated", "header cut", "empty", "text", "endless header"])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-1],
            "header cut": content[:40],
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "endless header": b"\xff" * 64,
        }[damage]
    )
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be read as safetensors"):
        read_safetensors(path)


def test_missing_file_and_folder_in_its_place_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors does not exist"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match=str(tmp_path)):
        read_safetensors(tmp_path)


def test_type_that_is_no_weights_is_refused_with_tensor_and_file(tmp_path: Path) -> None:
    save_file({"packed": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.safetensors: packed has type I8"):
        read_safetensors(tmp_path / "model.safetensors")


def test_writer_holds_its_caller_to_the_plan(tmp_path: Path) -> None:
    with ChecksummedFile(tmp_path / "x") as file:
        writer = SafetensorsWriter(file, [TensorInfo("a", torch.float32, (2,))])
        with pytest.raises(AssertionError, match="was not written"):
            writer.finish()
        with pytest.raises(AssertionError, match="expected"):
            writer.write(torch.ones(3))
