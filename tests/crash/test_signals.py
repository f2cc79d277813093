"""A signal that asks a run to end, at every place: it ends with exit code 75, and the same command ends as if nothing had been."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, write_chats, write_toml
from crash.same import check_same_run, step_names

from tunelib.parallel.runtime import ONE_SIGNAL_SECONDS

pytestmark = pytest.mark.crash

SAVING = """
[checkpoint]
enable_checkpoint = true
interval = 3
[validation]
enable = true
fraction = 0.1
freq = 4
prompts = ["say sage"]
max_new_tokens = 4
"""
STEPS = ["--training.steps", "8"]
AGAIN, ON = "the same command begins again", "the same command goes on from there"
MANAGER = "tunelib.checkpoint.manager"


@dataclass(frozen=True)
class Runs:
    """Runs of one command on so many ranks; ``whole`` is one that nothing interrupts."""

    forks: Any
    world_size: int
    toml: Path
    whole: Run

    def go(self, folder: Path, *words: str, **rest: Any) -> list[Any]:
        return self.forks.run([self.toml, *STEPS, "--job.dump_folder", folder, *words], self.world_size, **rest)

    def check_goes_on(self, run: Run, *words: str) -> None:
        """The same command ends well, and nothing is lost."""
        ended = self.go(run.folder, *words)
        assert [each.code for each in ended] == [0] * self.world_size, ended
        check_same_run(run, self.whole)
        assert step_names(run)[-1] == "step-8"


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request: pytest.FixtureRequest, forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    toml = write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 120), SAVING)
    runs = Runs(forks, request.param, toml, Run(folder / "whole"))
    assert {ended.code for ended in runs.go(runs.whole.folder)} == {0}
    return runs


# Where the signal comes: as a function is called, the so many-th time; the step that is saved; None: training has not begun.
PLACES: dict[str, tuple[str, int, int | None]] = {
    "start, the model on paper": ("train.build_on_meta", 1, None),
    "start, what to go on from": (f"{MANAGER}.CheckpointManager.decide", 1, None),
    "start, the model spread": ("train.spread_model", 1, None),
    "start, weights": ("train.fill", 1, None),
    "start, the optimizer": ("train.build_optimizer", 1, None),
    "start, the opening lines": ("train.opening_lines", 1, 0),
    "first validation": ("train.evaluate", 1, 0),
    "first samples": ("train.answer_prompts", 1, 0),
    "first step": ("train.train_step", 1, 1),
    "backward of the first step": ("torch.Tensor.backward", 1, 1),
    "gradients of a step": ("train.clip_gradients", 4, 4),
    "optimizer of a step": ("train.set_lr", 5, 5),
    "the step before the last": ("train.train_step", 7, 7),
    "validation": ("train.evaluate", 2, 4),
    "validation, in its midst": ("train.forward_only", 2, 4),
    "save": (f"{MANAGER}.CheckpointManager._write", 1, 3),
    "save, as tensors are written": (f"{MANAGER}.save_tensors", 2, 6),
    "save, as it gets its name": ("tunelib.files.commit_folder", 1, 3),
    "row of a step": ("tunelib.observe.metrics.RowWriter.write", 5, 3),
}
# After the last step, where nothing is left to do but to write it down.
CLOSING: dict[str, tuple[str, int]] = {
    "last step": ("train.train_step", 8),
    "last samples": ("train.answer_prompts", 2),
    "last save": (f"{MANAGER}.CheckpointManager._write", 3),
    "last save, as tensors are written": (f"{MANAGER}.save_tensors", 3),
    "export": ("train.export_model", 1),
    "export, as it is proven": ("tunelib.formats.prove.check_export", 1),
    "after the export": ("train.describe_export", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_run_ends_saved_wherever_a_signal_comes_and_the_same_command_ends_as_if_nothing_had_been(runs: Runs, tmp_path: Path, place: str) -> None:
    call, count, step = PLACES[place]
    run = Run(tmp_path / "run")
    ended = runs.go(run.folder, fault="signal_at", call=call, count=count)
    check_stopped(ended, step)
    if step:
        assert step_names(run)[-1] == f"step-{step}"
    runs.check_goes_on(run)


@pytest.mark.parametrize("place", ["start, the model on paper", "backward of the first step", "validation", "optimizer of a step", "save"])
@pytest.mark.parametrize("at_rank", [0, 1])
@pytest.mark.parametrize("runs", [2], ids=["2 ranks"], indirect=True)
def test_signal_to_one_rank_stops_all_at_the_same_step(runs: Runs, tmp_path: Path, place: str, at_rank: int) -> None:
    call, count, step = PLACES[place]
    run = Run(tmp_path / "run")
    check_stopped(runs.go(run.folder, fault="signal_at", call=call, count=count, at_rank=at_rank), step)
    runs.check_goes_on(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_signal_that_asks_for_an_end_is_heeded(runs: Runs, tmp_path: Path, number: int) -> None:
    run = Run(tmp_path / "run")
    check_stopped(runs.go(run.folder, fault="signal_at", call="train.train_step", count=2, number=number), 2)
    runs.check_goes_on(run)


@pytest.mark.parametrize("place", CLOSING)
def test_signal_after_the_last_step_loses_nothing(runs: Runs, tmp_path: Path, place: str) -> None:
    """What is left takes its time, and the run is whole; or it is saved, and the same command does the rest."""
    call, count = CLOSING[place]
    run = Run(tmp_path / "run")
    ended = runs.go(run.folder, fault="signal_at", call=call, count=count)
    if ended[0].code:
        check_stopped(ended, 8)
        runs.check_goes_on(run)
    assert [each.code for each in ended] == [0] * runs.world_size or ended[0].code == 75
    check_same_run(run, runs.whole)


@pytest.mark.parametrize(
    ("call", "count", "step"), [(f"{MANAGER}.save_tensors", 1, None), ("tunelib.files.commit_folder", 1, None), ("train.train_step", 4, 4)]
)
def test_signal_while_a_save_is_in_the_background(runs: Runs, tmp_path: Path, call: str, count: int, step: int | None) -> None:
    run, words = Run(tmp_path / "run"), ["--checkpoint.async_mode", "async"]
    ended = runs.go(run.folder, *words, fault="signal_at", call=call, count=count)
    said = check_codes(ended)
    stopped_after = int(said.split("stopped after step ")[1].split()[0])
    assert stopped_after == step if step else stopped_after >= 3
    assert step_names(run)[-1] == f"step-{stopped_after}"
    runs.check_goes_on(run, *words)


@pytest.mark.parametrize(
    ("call", "count"), [("tunelib.data.index.build_source", 1), ("tunelib.data.build.add_documents", 1), ("train.train_step", 3)]
)
def test_no_process_that_tokenises_outlives_a_signal(runs: Runs, tmp_path: Path, call: str, count: int) -> None:
    run, words = Run(tmp_path / "run"), ["--dataset.cache_folder", str(tmp_path / "cache")]
    mark = {"TUNELIB_TEST_MARK": str(tmp_path)}
    ended = runs.go(run.folder, *words, fault="signal_at", call=call, count=count, workers=2, environment=os.environ | mark)
    check_stopped(ended, None if "data" in call else 3)
    assert find_marked(mark) == []
    runs.check_goes_on(run, *words)


@pytest.mark.parametrize(("call", "count"), [("train.train_step", 5), (f"{MANAGER}.CheckpointManager._write", 2)])
def test_second_signal_ends_the_run_at_once_with_the_newest_checkpoint_left(runs: Runs, tmp_path: Path, call: str, count: int) -> None:
    """In the midst of a step, and of a save."""
    run = Run(tmp_path / "run")
    ended = runs.go(run.folder, fault="signal_at", call=call, count=count, wait=ONE_SIGNAL_SECONDS + 0.1)
    assert [each.code for each in ended] == [1] * runs.world_size
    assert step_names(run)[-1] == "step-3"
    runs.check_goes_on(run)


@pytest.mark.parametrize("place", ["start, the model on paper", "optimizer of a step"])
def test_signal_that_comes_twice_within_a_moment_is_one(runs: Runs, tmp_path: Path, place: str) -> None:
    call, count, step = PLACES[place]
    run = Run(tmp_path / "run")
    check_stopped(runs.go(run.folder, fault="signal_at", call=call, count=count, wait=0.1), step)
    runs.check_goes_on(run)


@pytest.mark.parametrize("first", ["launcher", "workers"])
def test_signal_to_every_process_of_a_job_is_one(tmp_path: Path, first: str) -> None:
    """As systemd and SLURM send it: run_train.sh's process has it, and passes it on to the workers, which have it already."""
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), SAVING.replace("interval = 3", "interval = 100000"))
    stopped, whole = Run(tmp_path / "stopped"), Run(tmp_path / "whole")
    command = ["./run_train.sh", str(toml), "--validation.freq", "100000", "--job.dump_folder"]
    environment = os.environ | {"NGPU": "2", "OMP_NUM_THREADS": "1"}
    words = [*command, str(stopped.folder), "--training.steps", "100000"]
    launcher = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (stopped.folder / "metrics.jsonl").exists() or len(stopped.rows()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes = find_tree(launcher.pid)
        for process in processes if first == "launcher" else reversed(processes):
            os.kill(process, signal.SIGTERM)
        said = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
        launcher.communicate()
    assert len(processes) == 3
    assert launcher.returncode == 75, said
    assert said.count("by a signal, and saved; the same command goes on from there") == 1
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    step = stopped.rows()[-1]["step"]
    assert step_names(stopped) == [f"step-{step}"]
    for run in (stopped, whole):
        words = [*command, str(run.folder), "--training.steps", str(step + 2)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    check_same_run(stopped, whole)


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="layers are compiled with g++")
def test_signal_while_layers_are_compiled(forks: Any, tmp_path: Path) -> None:
    """The first step, which compiles, is taken to its end."""
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), SAVING)
    runs = Runs(forks, 1, toml, Run(tmp_path / "whole"))
    run, mark = Run(tmp_path / "run"), {"TUNELIB_TEST_MARK": str(tmp_path)}

    def compile_and_train(folder: Path, comes: bool) -> list[Any]:
        return runs.go(folder, "--compile.enable", fault="signal_in_compilation", comes=comes, timeout=400, environment=os.environ | mark)

    check_stopped(compile_and_train(run.folder, comes=True), 1)
    assert find_marked(mark) == []
    for folder in (run.folder, runs.whole.folder):
        (done,) = compile_and_train(folder, comes=False)
        assert done.code == 0, done.said
    check_same_run(run, runs.whole)


def check_stopped(ended: list[Any], step: int | None) -> None:
    """Every rank ended with exit code 75, and one said after which step, and how to go on."""
    said = check_codes(ended)
    if step is None:
        assert f"stopped by a signal before training began; {AGAIN}" in said
    elif step == 0:
        assert f"stopped by a signal before the first step; {AGAIN}" in said
    else:
        assert f"stopped after step {step} by a signal, and saved; {ON}" in said


def check_codes(ended: list[Any]) -> str:
    said = "".join(each.said for each in ended)
    assert [each.code for each in ended] == [75] * len(ended), said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert said.count("by a signal") == 1
    return said


def find_tree(process: int) -> list[int]:
    """A process, and below it what it has started (Linux)."""
    children = [int(child) for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split()]
    return [process, *(below for child in children for below in find_tree(child))]


def find_marked(mark: dict[str, str]) -> list[str]:
    """Processes that were started with a variable (Linux)."""
    ((name, value),) = mark.items()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{name}={value}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_signal_while_a_checkpoint_is_loaded_is_a_stop(tmp_path: Path, forks: Any, world_size: int) -> None:
    """torch's DCP takes whatever is raised in it for an error of its own."""
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), "[checkpoint]\nenable_checkpoint = true\n")
    words = [toml, "--job.dump_folder", tmp_path / "run", "--training.steps"]
    for ended in forks.run([*words, "4"], world_size):
        assert ended.code == 0, ended.said
    first, *others = forks.run([*words, "8"], world_size, fault="signal_in_load")
    assert [first.code, *(ended.code for ended in others)] == [75] * world_size, first.said
    assert "stopped by a signal before training began; the same command begins again" in first.said
    for ended in forks.run([*words, "8"], world_size):
        assert ended.code == 0, ended.said
