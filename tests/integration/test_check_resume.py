"""The drill of scripts/check_resume.py: a run that comes back is said to, and a trainer that loses something is found out."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT, write_chats, write_toml
from hub_server import hub_environment, serve_hub

from tunelib.checkpoint.drill import KILLED, RESUMED, UNINTERRUPTED, DrillError, Plan, resume
from tunelib.checkpoint.drill_traces import LIMITS, Comparison, read_trace
from tunelib.config import load_or_exit
from tunelib.errors import ConfigError

SECTIONS = "[checkpoint]\nenable_checkpoint = true\nmodel_weights_only = true\n[validation]\nenable = true\nfraction = 0.1\n"
SCRIPT = ROOT / "scripts/check_resume.py"
FAULTY = """
import sys, train
from tunelib.checkpoint import progress
from tunelib.data.loader import TrainData
from tunelib.parallel.runtime import leave, run_main
{fault}
leave(run_main(train.main, sys.argv[1:]))
"""


def load_script():
    """scripts/check_resume.py as a module."""
    spec = importlib.util.spec_from_file_location("check_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_resume"] = module  # which its dataclasses ask for
    spec.loader.exec_module(module)
    return module


def check(toml: Path, *words: str, folder: Path, steps: int = 3) -> tuple[int, str]:
    """Exit code and output of the script, in this process; an error is raised as it is."""
    said = StringIO()
    with redirect_stdout(said):
        code = load_script().main(["--job.config_file", str(toml), "--steps", str(steps), "--folder", str(folder), *words])
    return code, said.getvalue()


@dataclass(frozen=True)
class Drilled:
    """A drill that has ended well, and its folder."""

    plan: Plan
    output: str

    def again(self, fault: str = "", num_processes: int = 1, name: str = "faulty") -> Comparison:
        """Resume once more, with a fault put into the program."""
        program = self.plan.folder / f"{name}.py"
        program.write_text(FAULTY.format(fault=fault))
        shutil.rmtree(self.plan.folder / RESUMED.format(num_processes), ignore_errors=True)
        expected = read_trace(self.plan.folder / UNINTERRUPTED, self.plan.checkpoint_folder)
        return resume(replace(self.plan, program=program), expected, num_processes)


def drill(folder: Path, *words: str) -> Drilled:
    """A drill on one process, with all that it leaves."""
    toml = write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 120), SECTIONS)
    toml.write_text(toml.read_text().replace("[training]", "[training]\nepochs = 2"))
    code, output = check(toml, "--other_ngpu", "0", "--keep", *words, folder=folder)
    assert code == 0, output
    (kept,) = folder.glob("*.check_resume-*")
    changed = (line for line in output.splitlines() if "otherwise than in the config: " in line)
    pairs = [pair.split(" = ") for pair in next(changed).partition("config: ")[2].split(", ")]
    words = tuple(word for key, value in pairs for word in (f"--{key}", value))
    return Drilled(Plan((str(kept / "config.toml"), *words), kept, "checkpoint", 1, 3, 240, LIMITS["float32"]), output)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread only waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Drilled:
    return drill(tmp_path_factory.mktemp("good"))


def test_run_that_comes_back_is_said_to(good: Drilled) -> None:
    lines = good.output.splitlines()
    for change in ("training.steps = 3", "checkpoint.model_weights_only = false", "validation.enable = false"):
        assert change in lines[0]
    assert ".step-2.tunelib-staging holds __0_0.distcp" in good.output
    assert "there is no step-2, and step-1 is whole" in good.output
    assert next(line for line in lines if line.startswith("before the kill")).split()[3:] == ["1–2", *["equal"] * 5, *["–"] * 3]
    assert next(line for line in lines if line.startswith("resumed on 1 process")).split()[4:] == ["2–3", *["equal"] * 8]
    assert "verdict: this run comes back" in lines


def test_killed_run_left_a_checkpoint_half_written(good: Drilled) -> None:
    killed = good.plan.folder / KILLED / "run/checkpoint"
    assert sorted(path.name for path in killed.iterdir()) == [".step-2.tunelib-staging", "step-1"]
    assert not (killed / ".step-2.tunelib-staging/manifest.json").exists()
    assert sum(path.stat().st_size for path in (killed / ".step-2.tunelib-staging").iterdir()) > 0
    resumed = good.plan.folder / "resumed-1/run/checkpoint"
    assert sorted(path.name for path in resumed.iterdir()) == ["step-1", "step-2", "step-3"]


LOST_MOMENTS = """
load = progress.tensors_to_load
progress.tensors_to_load = lambda *a: {n: tensor for n, tensor in load(*a).items() if not n.startswith("optimizer.")}
"""
LOST_PLACE = """
take = TrainData.step
TrainData.step = lambda self, number: take(self, number - 1)
"""
LOST_SCHEDULE = """
factor = train.lr_factor
train.lr_factor = lambda section, step, num_steps: factor(section, step, num_steps) * (1.0 if step > 2 else 0.5)
"""
LOST_ALL = """
import shutil
shutil.rmtree(next(word for word in sys.argv if word.endswith("/run")) + "/checkpoint")
"""


def test_lost_moments_of_the_optimizer_are_found(good: Drilled) -> None:
    faults = good.again(LOST_MOMENTS).faults
    assert any(fault.startswith("loss of step 3 is ") for fault in faults)
    assert any(fault.startswith("optimizer.") for fault in faults)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (LOST_PLACE, "it went on with step 1, though step 1 was saved"),
        (LOST_SCHEDULE, "lr of step 2 is 0.005 instead of 0.01"),
        (LOST_ALL, "it went on with step 1, though step 1 was saved"),
    ],
    ids=["place", "schedule", "all"],
)
def test_what_else_a_trainer_may_lose_is_found(good: Drilled, fault: str, said: str) -> None:
    assert good.again().faults == []
    assert said in good.again(fault).faults


@pytest.mark.crash
def test_lost_moments_are_found_on_another_number_of_processes(good: Drilled) -> None:
    assert good.again(num_processes=2).faults == []
    assert any(fault.startswith("optimizer.") for fault in good.again(LOST_MOMENTS, num_processes=2).faults)


@pytest.mark.crash
def test_lost_random_state_is_found_where_it_matters(tmp_path: Path) -> None:
    drilled = drill(tmp_path, "--lora.enable", "--lora.dropout", "0.5")
    assert drilled.again().faults == []
    assert any(fault.startswith("loss of step 2") for fault in drilled.again("progress.restore_rng = lambda *_: None").faults)


@pytest.mark.crash
def test_run_that_cannot_be_resumed_is_found_with_what_it_said(good: Drilled) -> None:
    data = good.plan.folder.parent / "chats.jsonl"
    before = data.read_text()
    data.write_text("".join(reversed(before.splitlines(keepends=True))))
    try:
        (fault,) = good.again().faults
    finally:
        data.write_text(before)
    assert fault.startswith("the run resumed-1 ended by itself with exit code 2; the end of ")
    assert "content of the data" in fault


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), "[lr_scheduler]\nwarmup_steps = 2\n")


@pytest.mark.crash
@pytest.mark.parametrize(
    ("words", "after"),
    [
        ([], "2 processes"),
        (["--ngpu", "2"], "1 process"),
        (["--checkpoint.enable_checkpoint", "--checkpoint.async_mode", "async"], "2 processes"),
        (["--lora.enable", "--lora.rank", "4"], "2 processes"),
        (["--lora.enable", "--lora.dropout", "0.1", "--ngpu", "2"], ""),
        (["--ngpu", "2", "--parallelism.tensor_parallel_degree", "2", "--training.dtype", "float64"], "4 processes"),
        (["--ngpu", "2", "--parallelism.pipeline_parallel_degree", "2", "--dataset.no-packing", "--other_ngpu", "0"], ""),
    ],
    ids=["1 to 2", "2 to 1", "async", "lora", "dropout", "tensor", "pipeline"],
)
def test_runs_of_many_kinds_come_back(tmp_path: Path, toml: Path, words: list[str], after: str) -> None:
    code, output = check(toml, "--training.steps", "100", *words, folder=tmp_path, steps=6)
    assert code == 0, output
    assert ".step-4.tunelib-staging holds " in output
    assert output.count("\nresumed on ") == (2 if after else 1)
    assert f"\nresumed on {after}" in output
    assert "verdict: this run comes back" in output
    assert not list(tmp_path.glob("*.check_resume-*"))


@pytest.mark.crash
def test_stream_comes_back_on_as_many_processes(tmp_path: Path, toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(line for line in toml.read_text().splitlines() if line.startswith("path = "))
    toml.write_text(toml.read_text().replace(data, 'hub = "someone/chats"\nstreaming = true'))
    with serve_hub() as endpoint:
        for name, value in hub_environment(endpoint, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        code, output = check(toml, "--training.steps", "100", "--training.global_batch_size", "4", folder=tmp_path / "drills", steps=6)
    assert code == 0, output
    assert "resuming on another number of processes is left out: the order of a stream (dataset.streaming) depends on it" in output
    assert output.count("\nresumed on ") == 1


@pytest.mark.parametrize(
    ("words", "numbers", "said"),
    [
        ([], [2], ""),
        (["--lora.enable", "--lora.dropout", "0.1"], [], "left out: lora.dropout"),
        (["--training.global_batch_size", "1"], [], "left out: training.global_batch_size = 1: is not a multiple of 2"),
        (["--ngpu", "4"], [2], ""),
        (["--ngpu", "4", "--parallelism.tensor_parallel_degree", "4"], [8], "on 8 processes besides, since half as many will not do: "),
        (["--ngpu", "4", "--parallelism.tensor_parallel_degree", "4", "--other_ngpu", "8"], [8], ""),
        (["--other_ngpu", "0"], [], ""),
    ],
)
def test_other_number_of_processes_is_one_that_the_layout_takes(
    tmp_path: Path, toml: Path, words: list[str], numbers: list[int], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # whose number would be the most
    script = load_script()
    own, others = script.read_words([str(toml), "--training.steps", "9", *words])
    _, found = script.make_plan(own, load_or_exit(others, world_size=own.ngpu), tmp_path)
    assert found == numbers
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (2 if said else 1)
    assert said in printed[-1]


def test_run_that_fails_by_itself_is_told_and_kept(tmp_path: Path, toml: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": 5}\n')
    with pytest.raises(DrillError, match=r"(?s)the run uninterrupted ended by itself with exit code 2; the end of .*chats\.jsonl") as raised:
        check(toml, "--training.steps", "100", folder=tmp_path)
    assert raised.value.exit_code == 1
    assert "Traceback" not in str(raised.value)
    assert len(list(tmp_path.glob("*.check_resume-*/uninterrupted/log.txt"))) == 1


def test_run_that_takes_too_long_is_told(tmp_path: Path, toml: Path) -> None:
    with pytest.raises(DrillError, match=r"the run uninterrupted has not ended within 0\.5 seconds \(--timeout_seconds\)"):
        check(toml, "--training.steps", "100", "--timeout_seconds", "0.5", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--training.step", "4"], "did you mean --training.steps?"),
        (["--steps", "2"], "--steps is at least 3"),
        (["--ngpu", "0"], "--ngpu is at least 1"),
        (
            ["--training.steps", "9", "--training.global_batch_size", "1", "--other_ngpu", "2"],
            "--other_ngpu 2: training.global_batch_size = 1: is not a multiple of 2",
        ),
    ],
)
def test_wrong_words_are_answered_with_a_sentence(tmp_path: Path, toml: Path, words: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((SystemExit, ConfigError)) as raised:
        load_script().main([str(toml), *words, "--folder", str(tmp_path / "drills")])
    assert getattr(raised.value, "exit_code", None) or raised.value.code == 2  # type: ignore[union-attr]  # a SystemExit has a code
    assert named in str(raised.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("drills/*"))


def test_missing_config_is_answered_with_a_sentence(tmp_path: Path) -> None:
    program = [sys.executable, str(SCRIPT), "--job.config_file", "missing.toml"]
    ended = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "command line: there is no config file missing.toml; give the path of a TOML file\n"


@pytest.mark.crash
@pytest.mark.parametrize(("world_size", "number", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)])
def test_signal_ends_the_drill_and_its_processes(tmp_path: Path, toml: Path, world_size: int, number: int, code: int) -> None:
    words = ["--ngpu", str(world_size), "--training.steps", "100", "--steps", "100000", "--folder", str(tmp_path)]
    started = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(toml), *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        pids = list(wait_for_processes(tmp_path, world_size))
        started.send_signal(number)
        said = started.communicate(timeout=60)[1]
    finally:
        started.kill()
        started.wait()
    assert started.returncode == code, said
    assert "Traceback" not in said
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.glob("*.check_resume-*"))


def wait_for_processes(folder: Path, world_size: int) -> Iterator[int]:
    """The numbers of the processes that train, once they do."""
    deadline = time.monotonic() + 120
    while not [line for path in folder.glob("*/uninterrupted/run/metrics.jsonl") for line in path.read_text().splitlines()]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for rank in range(world_size):
        (path,) = folder.glob(f"*/uninterrupted/pid-{rank}")
        yield json.loads(path.read_text())
