"""Two "machines": network namespaces of this one, joined by a pair of virtual Ethernet interfaces; needs Linux, `ip` and the right to make them.

The only way from one to the other is that pair. The name of this host leads where /etc/hosts says, as on a user's machine, and both share its disk.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, Run, write_chats, write_toml

SETTINGS = """
[checkpoint]
enable_checkpoint = true
interval = 10
[validation]
enable = true
fraction = 0.1
freq = 20
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 30
"""
NUM_STEPS = 60
WORDS = ["--training.steps", str(NUM_STEPS), "--training.dtype", "float64"]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
SECONDS = 90
"""Limit of every wait; what is waited for takes 20 or less."""


@dataclass
class Launch:
    """A running ./run_train.sh, all processes of which see the same environment variable TUNELIB_TEST_LAUNCH."""

    process: subprocess.Popen
    output: Path
    label: str

    def wait(self) -> int:
        """Its exit code; none in time fails the test."""
        return self.process.wait(timeout=SECONDS)

    def said(self) -> str:
        return self.output.read_text()

    def pids(self) -> dict[int, list[str]]:
        """The words of all its living processes, by number."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"TUNELIB_TEST_LAUNCH={self.label}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().split("\0")
            except OSError:  # it has ended, or is somebody else's
                continue
        return {pid: words for pid, words in found.items() if words != [""]}  # the dead have no words

    def workers(self) -> list[int]:
        """The processes that train."""
        return sorted(pid for pid, words in self.pids().items() if str(ROOT / "train.py") in words and "tunelib.parallel.launch" not in words)


@dataclass
class Launcher:
    """Starts ./run_train.sh, inside a namespace where one is named, and ends all that is left of it."""

    folder: Path
    launches: list[Launch] = field(default_factory=list)

    def start(self, toml: Path, run: Run, *words: str, namespace: str = "", **variables: str) -> Launch:
        label = f"{os.getpid()}-{len(self.launches)}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {"PATH": path, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "TUNELIB_TEST_LAUNCH": label, "TMPDIR": str(self.folder)}
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        output = self.folder / f"launch-{len(self.launches)}.txt"
        with output.open("w") as file:
            command = [*inside, "./run_train.sh", str(toml), "--job.dump_folder", str(run.folder), *WORDS, *words]
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ours | variables, stdout=file, stderr=subprocess.STDOUT)
        self.launches.append(Launch(process, output, label))
        return self.launches[-1]

    def end(self) -> None:
        for launch in self.launches:
            for pid in launch.pids():
                os.kill(pid, signal.SIGKILL)
            launch.process.wait()


@dataclass
class Machines:
    """The two namespaces, and what starts a run in both."""

    launcher: Launcher
    names: tuple[str, str]

    def start(self, node: int, toml: Path, run: Run, *words: str, **variables: str) -> Launch:
        several = {"NNODES": "2", "NODE_RANK": str(node), "NGPU": "1", "RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500"}
        return self.launcher.start(toml, run, *words, namespace=self.names[node], **several, **variables)

    def start_both(self, toml: Path, run: Run, *words: str, **variables: str) -> list[Launch]:
        return [self.start(node, toml, run, *words, **variables) for node in (0, 1)]

    def sent_bytes(self) -> list[int]:
        """What each machine has sent to the other so far."""
        links = [subprocess.run(["ip", "-n", name, "-j", "-s", "link", "show", name], check=True, capture_output=True).stdout for name in self.names]
        return [json.loads(link)[0]["stats64"]["tx"]["bytes"] for link in links]


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.end()


@pytest.fixture
def machines(launcher: Launcher) -> Iterator[Machines]:
    """Two namespaces, each with an interface of the same name as itself; removed whatever happens."""
    names = (f"tl{os.getpid()}a", f"tl{os.getpid()}b")
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for name, address in zip(names, ADDRESSES, strict=True):
        commands += [f"-n {name} addr add {address}/24 dev {name}", f"-n {name} link set lo up", f"-n {name} link set {name} up"]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True, timeout=20)
        yield Machines(launcher, names)
    except FileNotFoundError:
        pytest.skip("no program ip: network namespaces cannot be made")
    except subprocess.CalledProcessError as error:
        if error.cmd[0] != "ip":
            raise
        pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
    finally:
        launcher.end()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 200), SETTINGS)


@pytest.fixture
def whole(train: Callable[..., Run], toml: Path) -> Run:
    """The same run in one process, without an interruption."""
    return train(toml, *WORDS)


def wait_until(condition: Callable[[], bool], launches: list[Launch]) -> None:
    """Wait for something that the launches do; one that ends before, or too long a wait, fails the test with what they said."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        alive = all(launch.process.poll() is None for launch in launches)
        assert alive, "\n".join(launch.said()[-4000:] for launch in launches)
        assert time.monotonic() < deadline, "\n".join(launch.said()[-4000:] for launch in launches)
        time.sleep(0.01)


def wait_for_step(run: Run, step: int, launches: list[Launch]) -> None:
    """Wait until a step is in metrics.jsonl, without reading a row that is being written."""
    metrics = run.folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), launches)


def assert_equal_runs(found: Run, expected: Run) -> None:
    """Every step and every validation once, and the same; float64: what differs is the order of sums."""
    assert [row["step"] for row in found.rows()] == [row["step"] for row in expected.rows()]
    assert [row["step"] for row in found.rows() if "loss" in row] == list(range(1, NUM_STEPS + 1))
    for name in ("loss", "grad_norm", "validation_loss", "tokens"):
        assert found.series(name) == pytest.approx(expected.series(name), rel=1e-9), name


@pytest.mark.slow
def test_two_machines_train_as_one_process_does_through_the_network(machines: Machines, toml: Path, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    second = machines.start(1, toml, run)
    wait_until(lambda: "waiting for machine 0 at 10.213.7.1:29500" in second.said(), [second])
    sent_before = machines.sent_bytes()
    first = machines.start(0, toml, run)
    assert [first.wait(), second.wait()] == [0, 0], first.said()[-4000:] + second.said()[-4000:]
    assert_equal_runs(run, whole)
    # Of the gradients, each of two ranks sends the half that it does not keep, in every step.
    half_of_gradients = sum(weight.numel() for weight in run.weights().values()) * 8 // 2
    for before, after in zip(sent_before, machines.sent_bytes(), strict=True):
        assert after - before > NUM_STEPS * half_of_gradients
    assert [first.pids(), second.pids()] == [{}, {}]


def test_port_in_use_is_said(launcher: Launcher, toml: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        endpoint = f"localhost:{other.getsockname()[1]}"
        launch = launcher.start(toml, Run(tmp_path / "run"), NNODES="2", NODE_RANK="0", RDZV_ENDPOINT=endpoint)
        assert launch.wait() == 1
    assert f"the machines do not meet at {endpoint}" in launch.said()
    assert "EADDRINUSE" in launch.said()
    assert "Traceback" not in launch.said()


@pytest.mark.parametrize("number", ["2", "first"])
def test_number_of_no_machine_is_said(launcher: Launcher, toml: Path, tmp_path: Path, number: str) -> None:
    launch = launcher.start(toml, Run(tmp_path / "run"), NNODES="2", NODE_RANK=number, RDZV_ENDPOINT="localhost:1")
    assert launch.wait() == 2
    assert launch.said() == f"run_train.sh: NODE_RANK must be a whole number from 0 to 1, not '{number}'\n"


@pytest.mark.crash
@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_killed_worker_ends_in_a_resume_on_both_machines(machines: Machines, toml: Path, whole: Run, tmp_path: Path, node: int, resume: str) -> None:
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run, "--checkpoint.resume", resume, MAX_RESTARTS="1")
    wait_for_step(run, 25, launches)
    (worker,) = launches[node].workers()
    os.kill(worker, signal.SIGKILL)
    assert [launch.wait() for launch in launches] == [0, 0], launches[0].said()[-4000:] + launches[1].said()[-4000:]
    assert launches[0].said().count("resuming after step 20: the newest good checkpoint") == 1
    assert_equal_runs(run, whole)
    assert [launch.pids() for launch in launches] == [{}, {}]


@pytest.mark.crash
def test_killed_worker_without_restarts_ends_both_machines_and_the_same_command_goes_on(
    machines: Machines, toml: Path, whole: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run)
    wait_for_step(run, 25, launches)
    (worker,) = launches[1].workers()
    os.kill(worker, signal.SIGKILL)
    begun = time.monotonic()
    assert [launch.wait() for launch in launches] == [1, 1]
    assert time.monotonic() - begun < 30
    assert [launch.pids() for launch in launches] == [{}, {}]
    assert "RendezvousConnectionError" not in launches[0].said() + launches[1].said()
    assert len(run.series("loss")) < NUM_STEPS
    again = machines.start_both(toml, run)
    assert [launch.wait() for launch in again] == [0, 0], again[0].said()[-4000:] + again[1].said()[-4000:]
    assert "resuming after step 20" in again[0].said()
    assert_equal_runs(run, whole)


@pytest.mark.crash
def test_lost_machine_that_comes_back_is_taken_in_again(machines: Machines, toml: Path, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run, MAX_RESTARTS="1")
    wait_for_step(run, 25, launches)
    for pid in launches[1].pids():
        os.kill(pid, signal.SIGKILL)
    launches[1].process.wait(timeout=SECONDS)
    back = machines.start(1, toml, run, MAX_RESTARTS="1")
    assert [launches[0].wait(), back.wait()] == [0, 0], launches[0].said()[-4000:] + back.said()[-4000:]
    assert_equal_runs(run, whole)


@pytest.mark.crash
def test_loss_of_machine_0_ends_the_others_and_the_same_command_goes_on(machines: Machines, toml: Path, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run, MAX_RESTARTS="1")
    wait_for_step(run, 25, launches)
    for pid in launches[0].pids():
        os.kill(pid, signal.SIGKILL)
    assert launches[1].wait() == 1
    assert "machine 0 has ended" in launches[1].said()
    assert launches[1].pids() == {}
    again = machines.start_both(toml, run)
    assert [launch.wait() for launch in again] == [0, 0], again[0].said()[-4000:] + again[1].said()[-4000:]
    assert_equal_runs(run, whole)


@pytest.mark.crash
def test_signal_after_a_restart_saves_and_gives_its_exit_code(machines: Machines, toml: Path, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run, MAX_RESTARTS="1")
    wait_for_step(run, 25, launches)
    (worker,) = launches[1].workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: "resuming after step 20" in launches[0].said(), launches)
    wait_for_step(run, 30, launches)
    for launch in launches:
        launch.process.send_signal(signal.SIGTERM)
    assert [launch.wait() for launch in launches] == [75, 75], launches[0].said()[-4000:] + launches[1].said()[-4000:]
    step = run.rows()[-1]["step"]
    assert (run.folder / f"checkpoint/step-{step}").is_dir()
    again = machines.start_both(toml, run)
    assert [launch.wait() for launch in again] == [0, 0], again[0].said()[-4000:] + again[1].said()[-4000:]
    assert f"resuming after step {step}" in again[0].said()
    assert_equal_runs(run, whole)


@pytest.mark.crash
def test_killed_worker_of_one_machine_ends_in_a_resume_however_late_a_rank_starts_again(
    launcher: Launcher, toml: Path, whole: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    launch = launcher.start(toml, run, NGPU="2", MAX_RESTARTS="1")
    wait_for_step(run, 25, [launch])
    before = launch.workers()
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: len(set(launch.workers()) - set(before)) == 2, [launch])
    late = max(launch.workers())
    os.kill(late, signal.SIGSTOP)  # the other one reaches the store long before, where the address of the killed one must not be found
    time.sleep(12)
    os.kill(late, signal.SIGCONT)
    assert launch.wait() == 0, launch.said()[-4000:]
    assert launch.said().count("resuming after step 20: the newest good checkpoint") == 1
    assert_equal_runs(run, whole)
    assert launch.pids() == {}


@pytest.mark.crash
@pytest.mark.parametrize("node", [0, 1])
def test_machine_whose_worker_lives_starts_again_with_the_others(machines: Machines, toml: Path, whole: Run, tmp_path: Path, node: int) -> None:
    """torchrun counts no restart on a machine that only follows another; its ranks must do as all the others, and its exit code be the last one's."""
    run = Run(tmp_path / "run")
    launches = machines.start_both(toml, run, "--checkpoint.resume", "never", MAX_RESTARTS="1")
    wait_for_step(run, 25, launches)
    (living,) = launches[1 - node].workers()
    (killed,) = launches[node].workers()
    os.kill(living, signal.SIGSTOP)  # it does not notice that the other one has gone
    os.kill(killed, signal.SIGKILL)
    has_sigterm = f"ShdPnd:\t{1 << (signal.SIGTERM - 1):016x}"
    wait_until(lambda: has_sigterm in Path(f"/proc/{living}/status").read_text(), launches)
    os.kill(living, signal.SIGCONT)
    wait_for_step(run, 30, launches)
    for launch in launches:
        launch.process.send_signal(signal.SIGTERM)
    assert [launch.wait() for launch in launches] == [75, 75], launches[0].said()[-4000:] + launches[1].said()[-4000:]
    again = machines.start_both(toml, run)
    assert [launch.wait() for launch in again] == [0, 0], again[0].said()[-4000:] + again[1].said()[-4000:]
    assert_equal_runs(run, whole)
