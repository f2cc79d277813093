"""On one process: types after "auto", exit codes, and who holds the run folder."""

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tunelib.config.schema import Comm, Parallelism, Training
from tunelib.errors import ConfigError, DataError, SaveError
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.runtime import Runtime, StopSignal, hold_folder, resolve_dtypes, run_main, start

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, CPU, (F32, F32, F32)),
        ({}, CUDA, (F32, BF16, F32)),
        ({"dtype": "bfloat16"}, CPU, (BF16, BF16, BF16)),
        ({"dtype": "bfloat16"}, CUDA, (BF16, BF16, F32)),
        ({"dtype": "float64"}, CPU, (F64, F64, F64)),
        ({"dtype": "float64"}, CUDA, (F64, F64, F64)),
        ({"mixed_precision_param": "bfloat16"}, CPU, (F32, BF16, F32)),
        ({"mixed_precision_param": "float32"}, CUDA, (F32, F32, F32)),
        ({"mixed_precision_reduce": "bfloat16"}, CUDA, (F32, BF16, BF16)),
    ],
    ids=str,
)
def test_types_after_auto_are_those_of_the_help(settings: dict[str, Any], device: torch.device, expected: tuple) -> None:
    assert resolve_dtypes(Training(**settings), device) == expected


def test_one_process_is_not_sharded_unless_it_computes_in_another_type() -> None:
    alone = Runtime(0, 1, CPU, F32, F32, F32)
    assert not alone.sharded
    assert dataclasses.replace(alone, compute_dtype=BF16).sharded
    assert dataclasses.replace(alone, world_size=2).sharded


def test_one_process_wakes_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if torch.cuda.is_available():
        pytest.skip("on CUDA one process computes in bfloat16, under FSDP2")
    with start(Training(seed=5), Comm()) as runtime:
        assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        drawn = torch.rand(3)
        layout = build_layout(Parallelism(), runtime)
        assert (layout.mesh, layout.data_rank, layout.num_data_ranks) == (None, 0, 1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_run_folder_has_one_run(tmp_path: Path) -> None:
    alone = Runtime(0, 1, CPU, F32, F32, F32)
    with hold_folder(tmp_path, alone), pytest.raises(ConfigError, match=r"--job\.dump_folder"), hold_folder(tmp_path, alone):
        pytest.fail("two runs")
    with hold_folder(tmp_path, alone):
        pass


def end_with(error: BaseException | None) -> int:
    def main(_: list[str]) -> None:
        if error is not None:
            raise error

    return run_main(main, [])


def test_exit_code_says_whose_fault_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TUNELIB_EXIT_CODE_FILE", str(tmp_path / "code"))
    assert end_with(None) == 0
    assert end_with(DataError("file:3: broken")) == 2
    assert capsys.readouterr().err == "error: file:3: broken\n"
    assert [path.read_text() for path in tmp_path.glob("code.*")] == ["2"]
    assert end_with(SaveError("no space")) == 1
    assert [path.read_text() for path in tmp_path.glob("code.*")] == ["2"], "the first process to fail knows best"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert end_with(SaveError("no space")) == 1
    assert [path.read_text() for path in tmp_path.glob("code.1-*")] == ["1"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=["Python", "CUDA", "CPU"],
)
def test_out_of_memory_ends_in_what_to_try(capsys: pytest.CaptureFixture[str], error: BaseException) -> None:
    assert end_with(error) == 1
    assert "--training.local_batch_size 1" in capsys.readouterr().err


def test_other_errors_show_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ZeroDivisionError("a bug"), RuntimeError("shape")):
        assert end_with(error) == 1
        written = capsys.readouterr().err
        assert "Traceback" in written
        assert f"{type(error).__name__}: {error}" in written


def test_signal_is_heeded_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", lost)
    with StopSignal() as stop:
        stop.wait_for_steps()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc")
def test_memory_of_a_step_is_there_for_the_next() -> None:
    """Pages that the system has to find for 64 MB that are freed and taken again; glibc takes some rounds to settle."""
    code = """
import resource, sys
import torch
from tunelib.parallel.runtime import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    found = {}
    for how in ("kept", "plain"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120, check=True)
        found[how] = int(done.stdout)
    assert found["kept"] < found["plain"] / 3, found
