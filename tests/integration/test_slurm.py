"""scripts/train.slurm with stand-ins for SLURM's programs, on one "node": what it starts, and when the job goes back into the queue."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Run, write_chats, write_toml

STAND_INS = {
    # becomes its task's first process, as slurmd has it; its own options go before the program
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\necho $$ >"$STAND_IN_FOLDER/task.pid"\nSLURM_NODEID=0 exec "$@"',
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat "$STAND_IN_FOLDER/task.pid")"',
    "scontrol": 'echo "$@" >>"$STAND_IN_FOLDER/asked.txt"',
}
SETTINGS = "[checkpoint]\nenable_checkpoint = true\ninterval = 100000\n"


@dataclass
class Slurm:
    """A folder with the stand-ins, and what they have written."""

    folder: Path

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        """The batch script, in the environment that SLURM gives it."""
        ours = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "STAND_IN_FOLDER": str(self.folder), "OMP_NUM_THREADS": "1"}
        path = f"{self.folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "scripts/train.slurm", *words]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | ours | {"PATH": path} | variables, stderr=subprocess.PIPE, text=True)

    def asked(self) -> list[str]:
        """What scontrol was asked to do."""
        log = self.folder / "asked.txt"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, program in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{program}\n")
        (folder / name).chmod(0o755)
    return Slurm(folder)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60), SETTINGS)


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_warning_saves_and_puts_the_job_back_once_and_the_job_goes_on(
    slurm: Slurm, toml: Path, tmp_path: Path, train: Callable[..., Run], processes: str
) -> None:
    run = Run(tmp_path / "run")
    words = [str(toml), "--job.dump_folder", str(run.folder), "--training.dtype", "float64"]
    job = slurm.start(*words, "--training.steps", "100000", NGPU=processes)
    try:
        deadline = time.monotonic() + 90
        while (not (run.folder / "metrics.jsonl").exists() or len(run.rows()) < 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 75, said
    assert said.count("by a signal, and saved; the same command goes on from there") == 1
    assert slurm.asked() == ["requeue 4711"]
    step = len(run.rows())
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == [f"step-{step}"]

    steps = ["--training.steps", str(step + 3)]
    again = slurm.start(*words, *steps, NGPU=processes)
    said = again.communicate(timeout=90)[1]
    assert again.returncode == 0, said
    assert slurm.asked() == ["requeue 4711"], "a job that is done does not go back"
    whole = train(toml, "--training.dtype", "float64", *steps)
    assert run.series("loss") == pytest.approx(whole.series("loss"), rel=1e-9)


def test_mistake_does_not_put_the_job_back(slurm: Slurm, toml: Path) -> None:
    job = slurm.start(str(toml), "--training.stpes", "10")
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 2
    assert "did you mean" in said
    assert slurm.asked() == []


def test_job_that_was_cancelled_does_not_come_back(slurm: Slurm, toml: Path, tmp_path: Path) -> None:
    """scancel signals the tasks; the script has had no warning."""
    run = Run(tmp_path / "run")
    job = slurm.start(str(toml), "--job.dump_folder", str(run.folder), "--training.steps", "100000")
    try:
        deadline = time.monotonic() + 90
        while not (run.folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int((slurm.folder / "task.pid").read_text()), signal.SIGTERM)
        said = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 75, said
    assert slurm.asked() == []


def test_script_without_slurm_says_what_to_use() -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", "scripts/train.slurm"], cwd=ROOT, env=without, capture_output=True, text=True)
    assert done.returncode != 0
    assert "without SLURM use ./run_train.sh" in done.stderr
