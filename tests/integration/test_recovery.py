"""What goes wrong in the midst of a run: numbers that are not finite, disks that are full, processes that hang; and saving while training goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, free_port, write_chats, write_toml
from crash.same import check_same_tensors, load_state

from tunelib.errors import SaveError

SAVING = "[checkpoint]\nenable_checkpoint = true\ninterval = 2\n"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), SAVING)


def run_faulty(fault: dict[str, Any], world_size: int, *words: str, timeout: int = 120) -> list[tuple[int, str]]:
    """Exit code and output of each process of a run with a fault."""
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests/integration/faulty_worker.py"), json.dumps(fault), *words]
    environments = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    workers = [subprocess.Popen(program, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for own in environments]
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [(worker.returncode, output) for worker, output in zip(workers, said, strict=True)]


def test_skipped_step_leaves_all_as_it_was(tmp_path: Path, toml: Path) -> None:
    words = [str(toml), "--training.steps", "6", "--training.on_nonfinite", "skip", "--checkpoint.interval", "1", "--job.dump_folder"]
    ((code, said),) = run_faulty({"what": "gradient", "steps": [4]}, 1, *words, str(tmp_path / "run"))
    assert code == 0, said
    run = Run(tmp_path / "run")
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in run.rows() if "passed_over" in row] == [4]
    before, after = (load_state(run.folder / f"checkpoint/step-{step}") for step in (3, 4))
    check_same_tensors(after, before)


def test_run_goes_back_to_the_newest_checkpoint(tmp_path: Path, toml: Path) -> None:
    words = [str(toml), "--training.steps", "8", "--training.on_nonfinite", "rollback", "--job.dump_folder", str(tmp_path / "run")]
    ((code, said),) = run_faulty({"what": "weight", "steps": [4]}, 1, *words)
    assert code == 0, said
    run = Run(tmp_path / "run")
    assert [row["step"] for row in run.rows()] == list(range(1, 9))
    assert [row["step"] for row in run.rows() if "passed_over" in row] == [4]
    assert all(math.isfinite(loss) for loss in run.series("loss"))
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())


def test_saving_in_the_background_saves_the_state_of_its_step(train: Callable[..., Run], toml: Path) -> None:
    plain = train(toml, "--training.steps", "6", "--checkpoint.keep_latest_k", "0")
    run = train(toml, "--training.steps", "6", "--checkpoint.keep_latest_k", "0", "--checkpoint.async_mode", "async")
    for step in (2, 4, 6):
        expected, found = (load_state(folder / f"checkpoint/step-{step}") for folder in (plain.folder, run.folder))
        check_same_tensors(found, expected)


def test_two_processes_save_in_the_background_while_they_train(tmp_path: Path, toml: Path) -> None:
    """The disk takes a second more a save, and steps go on; two saves never overlap, and the last one is waited for."""
    words = [str(toml), "--training.steps", "6", "--checkpoint.async_mode", "async", "--job.dump_folder", str(tmp_path / "run")]
    for code, said in run_faulty({"what": "slow disk", "steps": []}, 2, *words):
        assert code == 0, said
    whole = [str(toml), "--training.steps", "6", "--job.dump_folder", str(tmp_path / "plain")]
    run_faulty({"what": "none", "steps": []}, 2, *whole)
    run, plain = Run(tmp_path / "run"), Run(tmp_path / "plain")
    assert run.series("loss") == plain.series("loss")
    for step in (2, 4, 6):
        expected, found = (load_state(folder / f"checkpoint/step-{step}") for folder in (plain.folder, run.folder))
        assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_saves_that_fail_are_told_and_borne_for_a_while(tmp_path: Path, toml: Path, mode: str) -> None:
    words = [str(toml), "--training.steps", "8", "--checkpoint.async_mode", mode, "--job.dump_folder", str(tmp_path / "run")]
    ((code, said),) = run_faulty({"what": "full disk", "steps": [4, 6]}, 1, *words)
    assert code == 0, said
    assert said.count("No space left on device") == 2
    assert "NOT SAVED (2 in a row; checkpoint.max_failed_saves = 2)" in said
    assert sorted(path.name for path in (tmp_path / "run/checkpoint").iterdir()) == ["step-2", "step-8"]
    ((code, said),) = run_faulty({"what": "full disk", "steps": [2, 4, 6]}, 1, *words[:-1], str(tmp_path / "other"))
    assert code == 1
    assert not list((tmp_path / "other/checkpoint").iterdir())


def test_space_is_looked_at_before_a_save(train: Callable[..., Run], toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 19))
    with pytest.raises(SaveError, match=r"step-6 cannot be written: it takes about \d MiB, and 0 MiB are free there"):
        train(toml, "--training.steps", "6")


def test_retention_counts_what_is_finite(tmp_path: Path, train: Callable[..., Run], toml: Path) -> None:
    run = train(toml, "--training.steps", "12", "--checkpoint.keep_latest_k", "2", "--checkpoint.keep_every_n", "6")
    assert sorted(int(path.name[5:]) for path in (run.folder / "checkpoint").iterdir()) == [6, 10, 12]
    validation = ["--validation.enable", "--validation.fraction", "0.1", "--validation.freq", "2", "--checkpoint.keep_best"]
    best = train(toml, "--training.steps", "12", "--checkpoint.keep_latest_k", "1", "--optimizer.lr", "0.3", *validation)
    losses = {row["step"]: row["validation_loss"] for row in best.rows() if "validation_loss" in row and row["step"]}
    kept = sorted(int(path.name[5:]) for path in (best.folder / "checkpoint").iterdir())
    assert kept == sorted({min(losses, key=losses.__getitem__), 12})


def test_file_in_the_run_folder_asks_for_a_checkpoint(tmp_path: Path, toml: Path) -> None:
    run = Run(tmp_path / "run")
    words = [str(toml), "--training.steps", "100000", "--checkpoint.interval", "100000", "--job.dump_folder", str(run.folder)]
    worker = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run.folder / "metrics.jsonl").exists() and len(run.rows()) > 2)
        (run.folder / "SAVE").touch()
        wait_for(lambda: list((run.folder / "checkpoint").glob("step-*/manifest.json")) != [])
        wait_for(lambda: not (run.folder / "SAVE").exists())
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_lost_terminal_or_reader_does_not_cost_the_run(tmp_path: Path, toml: Path, number: int) -> None:
    """Ctrl-C also ends the ``tee`` behind a pipe, and then nobody reads what is printed."""
    run = Run(tmp_path / "run")
    words = [str(toml), "--training.steps", "100000", "--checkpoint.interval", "100000", "--job.dump_folder", str(run.folder)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup, and then so would train.py
    try:
        worker = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        wait_for(lambda: (run.folder / "metrics.jsonl").exists() and len(run.rows()) > 2)
        assert worker.stdout is not None
        worker.stdout.close()
        steps = len(run.rows())
        wait_for(lambda: len(run.rows()) > steps + 2)
        worker.send_signal(number)
        worker.wait(timeout=30)
        assert worker.stderr is not None
        said = worker.stderr.read()
        worker.stderr.close()
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 75, said
    assert "and saved; the same command goes on from there" in said
    assert len(list((run.folder / "checkpoint").glob("step-*/manifest.json"))) == 1


def test_signal_before_training_ends_the_run_where_it_is(tmp_path: Path, toml: Path) -> None:
    """Tokens of many documents are being made then: nothing is lost."""
    data = write_chats(tmp_path / "many.jsonl", 30000)
    words = [str(toml), "--dataset.path", str(data), "--training.steps", "5", "--job.dump_folder", str(tmp_path / "run")]
    worker = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: (tmp_path / "run/.lock").exists())
        time.sleep(0.3)
        worker.send_signal(signal.SIGTERM)
        said = worker.communicate(timeout=30)[0]
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 75, said
    assert "stopped by a signal before training began; the same command begins again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.crash
@pytest.mark.parametrize(("what", "world_size"), [("stop", 2), ("sleep", 1)])
def test_step_that_does_not_end_is_told_with_who_is_missing(tmp_path: Path, toml: Path, what: str, world_size: int) -> None:
    words = [str(toml), "--training.steps", "50", "--comm.train_timeout_seconds", "10", "--job.dump_folder", str(tmp_path / "run")]
    begun = time.monotonic()
    ended = run_faulty({"what": what, "steps": [5], "rank": world_size - 1}, world_size, *words)
    assert time.monotonic() - begun < 60
    assert ended[0][0] == 124, ended[0][1]
    assert "error: step 5 has not ended within 10 seconds" in ended[0][1]
    assert "if it was only slow, raise comm.train_timeout_seconds" in ended[0][1]
    summary = (tmp_path / "run/hang/summary.txt").read_text()
    assert ("nothing is heard of rank 1" in summary) == (what == "stop")
    assert "faulty_step" in (tmp_path / "run/hang/rank-0.txt").read_text()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
