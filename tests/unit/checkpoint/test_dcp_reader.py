"""Nothing in a DCP folder runs code; what cannot be loaded is a CheckpointError."""

import os
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tunelib.checkpoint.dcp_reader import SafeReader, load_tensors, on_this_process_alone
from tunelib.checkpoint.dcp_writer import save_tensors
from tunelib.errors import CheckpointError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "optimizer.a.step": torch.tensor(7.0), "rng.0.cpu": torch.arange(5, dtype=torch.uint8)}


class Bomb:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in STATE.items()}


def save_plainly(state: dict[str, Any], folder: Path) -> None:
    """What any torch program writes; values that are not tensors become pickles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def test_saved_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    loaded = blank()
    load_tensors(loaded, tmp_path / "step-1")
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in STATE.items())


def test_some_of_the_tensors_may_be_asked_for(tmp_path: Path) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    loaded = {"a": torch.zeros(2, 3)}
    load_tensors(loaded, tmp_path / "step-1")
    assert torch.equal(loaded["a"], STATE["a"])


def test_loads_in_two_threads_silence_each_others_remarks_to_the_end() -> None:
    begun, one_has_ended = threading.Event(), threading.Event()

    def remark() -> None:
        begun.set()
        with on_this_process_alone():
            one_has_ended.wait(timeout=30)
            warnings.warn("torch.distributed is disabled, unavailable or uninitialized, as torch says", stacklevel=1)

    with ThreadPoolExecutor(1) as pool:
        with on_this_process_alone():
            second = pool.submit(remark)
            begun.wait(timeout=30)
            time.sleep(0.1)  # it could be inside by now
        one_has_ended.set()
        second.result(timeout=30)


@pytest.mark.parametrize("where", ["root", "planner data", "storage data"])
def test_code_in_the_metadata_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    proof = tmp_path / "PROOF"
    metadata = pickle.loads((tmp_path / "step-1/.metadata").read_bytes())
    if where == "planner data":
        metadata.planner_data = Bomb(proof)
    elif where == "storage data":
        metadata.storage_data = {"a": Bomb(proof)}
    (tmp_path / "step-1/.metadata").write_bytes(pickle.dumps(Bomb(proof) if where == "root" else metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read.*mkdir"):
        load_tensors(blank(), tmp_path / "step-1")
    assert not proof.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch PROOF'\ntR.",
        b'cbuiltins\neval\n(S\'open("PROOF", "w")\'\ntR.',
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"cpathlib\nPosixPath.write_text\n(S'PROOF'\nS'x'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x12serialization.load\x93.",
        b"\x80\x04\x8c\x07pathlib\x8c\x14PosixPath.write_text\x93.",
    ],
)
def test_name_outside_the_allow_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1/.metadata").write_bytes(program)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        SafeReader(tmp_path / "step-1").read_metadata()
    assert not (tmp_path / "PROOF").exists()


def test_code_in_a_single_value_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "PROOF"
    save_plainly({"a": Bomb(proof)}, tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=r"step-1 cannot be loaded"):
        load_tensors({"a": torch.zeros(2)}, tmp_path / "step-1")
    assert not proof.exists()


def test_value_in_a_tensors_place_is_an_error_and_not_an_unfilled_tensor(tmp_path: Path) -> None:
    save_plainly({"a": 5}, tmp_path / "step-1")
    with pytest.raises(CheckpointError):
        load_tensors({"a": torch.zeros(2)}, tmp_path / "step-1")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04N.", pickle.dumps({"state_dict_metadata": {}}), b"\x80\x04" + b"(" * 1000])
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        load_tensors(blank(), tmp_path)


def test_folder_without_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata is missing.*not a DCP checkpoint"):
        load_tensors(blank(), tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    with pytest.raises(CheckpointError, match="another"):
        load_tensors(blank() | {"another": torch.zeros(1)}, tmp_path / "step-1")


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (6,), (3, 2)])
def test_tensor_of_another_shape_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=r"\ba\b"):
        load_tensors({"a": torch.zeros(shape)}, tmp_path / "step-1")


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_data_file_is_a_checkpoint_error(tmp_path: Path, damage: str) -> None:
    save_tensors(STATE, tmp_path / "step-1")
    (file,) = (tmp_path / "step-1").glob("*.distcp")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match="step-1"):
        load_tensors(blank(), tmp_path / "step-1")


def test_every_type_of_a_run_can_be_written_and_read(tmp_path: Path) -> None:
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    state = {str(dtype): torch.ones(3, dtype=dtype) for dtype in types}
    save_tensors(state, tmp_path / "step-1")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_tensors(loaded, tmp_path / "step-1")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
