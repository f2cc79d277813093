"""A DCP folder is read chunk by chunk, however torch divided its tensors, and one written here is like any other to torch."""

import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign import Payload, draw_weights, malicious_dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner import TensorWriteData as WriteData

from tunelib.errors import FormatError
from tunelib.files import ChecksummedFile, write_file
from tunelib.formats.dcp import DcpWriter, dcp_metadata, open_chunks
from tunelib.formats.tensors import StoredTensor, TensorInfo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
TENSORS = {
    "model.one": torch.arange(60, dtype=torch.float32).reshape(10, 6),
    "model.half": torch.arange(12).reshape(4, 3).bfloat16(),
    "model.norm": torch.tensor([1.0, float("nan"), -0.0, 3.0]),
    "model.scalar": torch.tensor(2.5),
}


class Divided(dcp.DefaultSavePlanner):
    """Saves every matrix in chunks along one dimension, as ranks of a mesh would."""

    def __init__(self, num_chunks: int, dim: int):
        super().__init__()
        self.num_chunks, self.dim = num_chunks, dim

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            dim = min(self.dim, tensor.ndim - 1)
            parts = tensor.chunk(self.num_chunks, dim=dim) if tensor.ndim else [tensor]
            begin = 0
            for number, part in enumerate(parts):
                offsets = torch.Size([begin if axis == dim else 0 for axis in range(tensor.ndim)])
                chunk = ChunkStorageMetadata(offsets, part.shape)
                data = WriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.shape)
                items.append(WriteItem(MetadataIndex(name, offsets, number), WriteItemType.SHARD, tensor_data=data))
                begin += part.shape[dim] if tensor.ndim else 0
        self.plan = SavePlan(items, planner_data={name: (name,) for name in self.state_dict})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self.state_dict[write_item.index.fqn][tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]


def save(folder: Path, tensors: dict[str, Any], num_chunks: int = 1, dim: int = 0) -> Path:
    dcp.save(tensors, checkpoint_id=folder, planner=Divided(num_chunks, dim) if num_chunks > 1 else None, no_dist=True)
    return folder


def stored(folder: Path) -> dict[str, StoredTensor]:
    found = {}
    for name, pieces in open_chunks(folder).items():
        shape = tuple(
            max(begin + size for begin, size in ends) for ends in zip(*(zip(p.begin, p.stored.shape, strict=True) for p in pieces), strict=True)
        )
        found[name] = StoredTensor(TensorInfo(name, pieces[0].stored.dtype, shape), tuple(pieces))
    return found


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(99.0), other.nan_to_num(99.0))


@pytest.mark.parametrize(("num_chunks", "dim"), [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)])
def test_any_part_is_read_however_the_tensor_is_divided(tmp_path: Path, num_chunks: int, dim: int) -> None:
    found = stored(save(tmp_path / "dcp", TENSORS, num_chunks, dim))
    assert found.keys() == TENSORS.keys()
    assert len(found["model.one"].pieces) == num_chunks
    for name, tensor in TENSORS.items():
        assert equal(found[name].read(), tensor)
    for first in range(10):
        for last in range(first, 11):
            part = (slice(first, last), slice(first % 3, 5))
            assert torch.equal(found["model.one"].read(part), TENSORS["model.one"][part])


def test_tensor_that_is_a_view_is_read_as_it_looks(tmp_path: Path) -> None:
    views = {"turned": TENSORS["model.one"].T, "rows": TENSORS["model.one"][2:5]}
    assert all(equal(tensor.read(), views[name]) for name, tensor in stored(save(tmp_path / "dcp", views)).items())


def test_values_that_are_no_tensors_are_left_lying_unread(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    save(tmp_path / "dcp", {"weight": torch.ones(2), "train_state": {"step": Payload(marker)}, "epoch": 3})
    assert list(open_chunks(tmp_path / "dcp")) == ["weight"]
    assert not marker.exists()


def write(folder: Path, files: list[dict[str, torch.Tensor]]) -> list[dict[str, int]]:
    folder.mkdir()
    writers, described = [], []
    for number, tensors in enumerate(files):
        with ChecksummedFile(folder / f"__0_{number}.distcp") as file:
            infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
            writers.append(DcpWriter(file, f"__0_{number}.distcp", infos))
            for tensor in tensors.values():
                writers[-1].write(tensor)
            described.append(writers[-1].finish())
    write_file(folder / ".metadata", dcp_metadata(writers))
    return described


def test_folder_written_here_loads_with_plain_torch(tmp_path: Path) -> None:
    names = list(TENSORS)
    strided = {"turned": TENSORS["model.one"].T}
    described = write(tmp_path / "dcp", [{name: TENSORS[name] for name in names[:2]}, {name: TENSORS[name] for name in names[2:]} | strided])
    for number, entry in enumerate(described):
        content = (tmp_path / "dcp" / f"__0_{number}.distcp").read_bytes()
        assert entry == {"size": len(content), "crc32": zlib.crc32(content)}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in (TENSORS | strided).items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(equal(loaded[name], tensor) for name, tensor in (TENSORS | strided).items())
    assert all(equal(tensor.read(), (TENSORS | strided)[name]) for name, tensor in stored(tmp_path / "dcp").items())


def test_parts_of_a_larger_storage_do_not_take_it_along(tmp_path: Path) -> None:
    large = torch.randn(1000, 100)
    (described,) = write(tmp_path / "dcp", [{"rows": large[3:5], "columns": large[:, 0]}])
    assert described["size"] < 10_000


def test_folder_written_here_becomes_a_flat_torch_file_by_torchs_own_tool(tmp_path: Path) -> None:
    write(tmp_path / "dcp", [TENSORS])
    command = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(tmp_path / "dcp"), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert found.keys() == TENSORS.keys()
    assert all(equal(found[name], tensor) for name, tensor in TENSORS.items())


# What is wrong


def test_metadata_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = malicious_dcp(tmp_path / "dcp")
    with pytest.raises(FormatError, match=r"dcp/\.metadata cannot be read: it asks for builtins\.exec"):
        open_chunks(tmp_path / "dcp")
    assert not marker.exists()


def test_chunk_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write(tmp_path / "dcp", [{"weight": torch.ones(2)}])
    torch.save(Payload(marker), tmp_path / "dcp/__0_0.distcp")
    _change_metadata(tmp_path / "dcp", lambda metadata: _set_length(metadata, (tmp_path / "dcp/__0_0.distcp").stat().st_size))
    with pytest.raises(FormatError, match=r"__0_0\.distcp is refused"):
        stored(tmp_path / "dcp")["weight"].read()
    assert not marker.exists()


def _set_length(metadata: Any, length: int) -> None:
    for place in metadata.storage_data.values():
        place.length = length


def _change_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _lose(attribute: str) -> Any:
    return lambda metadata: delattr(metadata.state_dict_metadata["model.one"], attribute)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing, which \.metadata names"),
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
        (lambda folder: (folder / ".metadata").write_bytes(b"nonsense"), r"\.metadata cannot be read"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "does not hold checkpoint metadata"),
        (lambda folder: _change_metadata(folder, lambda metadata: metadata.storage_data.clear()), r"\.metadata does not say where"),
        (lambda folder: _change_metadata(folder, _lose("chunks")), r"\.metadata cannot be read, it is damaged"),
        (
            lambda folder: _change_metadata(folder, lambda metadata: delattr(metadata, "state_dict_metadata")),
            r"\.metadata cannot be read, it is damaged",
        ),
    ],
    ids=["a file", "no metadata", "nonsense", "something else", "no places", "no chunks", "half of it"],
)
def test_damaged_folder_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    save(tmp_path / "dcp", TENSORS)
    change(tmp_path / "dcp")
    with pytest.raises(FormatError, match=words):
        open_chunks(tmp_path / "dcp")


def _of_other_shape(metadata: Any) -> None:
    size = torch.Size((3, 5))
    chunks = [ChunkStorageMetadata(torch.Size((0, 0)), size)]
    metadata.state_dict_metadata["model.one"] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:2000]), r"(damaged or truncated|not a file)"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b""), r"not a file of torch\.save"),
        (lambda folder: _change_metadata(folder, _of_other_shape), r"does not hold at byte \d+ what \.metadata says"),
    ],
    ids=["truncated", "empty", "another shape"],
)
def test_chunk_that_is_not_what_metadata_says_is_refused_when_it_is_read(tmp_path: Path, change: Any, words: str) -> None:
    save(tmp_path / "dcp", TENSORS)
    change(tmp_path / "dcp")
    with pytest.raises(FormatError, match=rf"__0_0\.distcp.*{words}"):
        [tensor.read() for tensor in stored(tmp_path / "dcp").values()]


def test_writer_holds_its_caller_to_the_plan(tmp_path: Path) -> None:
    with ChecksummedFile(tmp_path / "x") as file:
        writer = DcpWriter(file, "x", [TensorInfo("a", torch.float32, (2,))])
        with pytest.raises(AssertionError, match="was not written"):
            writer.finish()
        with pytest.raises(AssertionError, match="expected"):
            writer.write(torch.ones(3))


@pytest.mark.parametrize("allowed", [0, 100, 5_000])
def test_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path, allowed: int) -> None:
    class Full(ChecksummedFile):
        def write(self, data: bytes | memoryview) -> int:
            if self.size + len(memoryview(data)) > allowed:
                raise OSError(28, "No space left on device")
            return super().write(data)

    weights = {"a": torch.empty(30, 30), "b": torch.empty(30, 30)}
    draw_weights(weights, seed=0)
    with Full(tmp_path / "x") as file:
        writer = DcpWriter(file, "x", [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()])
        with pytest.raises(OSError, match="No space left"):
            [writer.write(tensor) for tensor in weights.values()]
