"""The drill: a run is killed in the midst of a save on purpose, resumed, and held against the run that was never stopped.

Every run is train.py itself on the user's own config, shortened, in a folder of its own: ``uninterrupted``; ``killed``, with SIGKILL while a
checkpoint is half on the disk (drill_worker.py meets that moment); and ``resumed-N``, copies of the killed one that go on with N processes.
drill_traces.py compares what they leave. All processes are on this machine, and it is they that die: what becomes of bytes that the disk does not
have yet when the power goes is not seen here.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelib.checkpoint.drill_traces import (
    Comparison,
    Trace,
    compare_last_checkpoints,
    compare_steps,
    read_trace,
    table_lines,
)
from tunelib.checkpoint.drill_worker import KILLED_FILE
from tunelib.errors import EXIT_CODE_FILE, TunelibError
from tunelib.files import staging_of
from tunelib.parallel.runtime import die_with_parent

ROOT = Path(__file__).parents[2]
UNINTERRUPTED, KILLED, RESUMED, LOG = "uninterrupted", "killed", "resumed-{}", "log.txt"
SECONDS_TO_END = 15
"""How long torchrun has to end its workers before it is killed."""
FEWEST_STEPS = 3
LINES_SHOWN = 25


class DrillError(TunelibError):
    """The drill could not be carried out: a run of it failed by itself, hung, or there is no room for it."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """What all runs of a drill share.

    Attributes:
        words: the config and the settings of every run, all but job.dump_folder.
        folder: the drill's own, where all goes.
        checkpoint_folder: where step folders lie in a run folder.
        num_processes: of the first two runs.
        steps: of every run.
        timeout_seconds: that a run may take.
        limits: by kind, the largest difference that another number of processes may make (drill_traces.py).
        program: what trains.
    """

    words: tuple[str, ...]
    folder: Path
    checkpoint_folder: str
    num_processes: int
    steps: int
    timeout_seconds: float
    limits: dict[str, float]
    program: Path = ROOT / "train.py"

    @property
    def saved_step(self) -> int:
        """The last step that is saved before the kill."""
        return save_interval(self.steps)

    @property
    def killed_step(self) -> int:
        """The step in whose save the run is killed."""
        return 2 * self.saved_step


def save_interval(steps: int) -> int:
    """Steps between saves, so that there is one before the save that is killed, and a step after it."""
    return max(steps // FEWEST_STEPS, 1)


def needed_settings(steps: int) -> dict[str, object]:
    """What the runs of a drill must have, whatever the config says: dotted key → value."""
    return {
        "training.steps": steps,
        "checkpoint.enable_checkpoint": True,
        "checkpoint.interval_type": "steps",
        "checkpoint.interval": save_interval(steps),
        "checkpoint.keep_latest_k": 0,
        "checkpoint.resume": "auto",
        "checkpoint.load_step": -1,
        "checkpoint.model_weights_only": False,
        "checkpoint.create_seed_checkpoint": False,
        "checkpoint.verify_export": False,
        "metrics.log_freq": 1,
        "metrics.enable_tensorboard": False,
        "metrics.enable_wandb": False,
        "validation.enable": False,
    }


def find_other_number(num_processes: int, most: int, find_fault: Callable[[int], str]) -> tuple[int, str]:
    """Another number of processes that a config can run on, half as many if that will do, and why not; 0 where there is none up to ``most``.

    Args:
        find_fault: says what speaks against a number, "" for nothing.
    """
    first = num_processes // 2 or 2
    numbers = [first, *range(num_processes - 1, 0, -1), *range(num_processes + 1, most + 1)]
    faults: dict[int, str] = {}
    for number in dict.fromkeys(number for number in numbers if number <= most):
        faults[number] = find_fault(number)
        if not faults[number]:
            return number, "" if number == first else faults.get(first, "")
    return 0, next(iter(faults.values()), f"this machine has room for {most}")


def carry_out(plan: Plan, others: Sequence[int], say: Callable[[str], None]) -> bool:
    """All of the drill, told as it goes, with the verdict at its end: whether the run comes back.

    Args:
        others: numbers of processes to resume on besides.

    Raises:
        DrillError: nothing was there to be resumed, or to compare with.
    """
    say(f"{UNINTERRUPTED}, on {count_processes(plan.num_processes)}: {plan.steps} steps, saved every {plan.saved_step}")
    expected = run_uninterrupted(plan)
    check_room(plan.folder, 1 + len(others))
    say(f"{KILLED}, on {count_processes(plan.num_processes)}, with SIGKILL in the midst of saving step {plan.killed_step}")
    say(f"  {run_killed(plan)}")
    comparisons = [compare_killed(plan, expected)]
    for number in [plan.num_processes, *others]:
        say(f"resumed, on {count_processes(number)}")
        comparisons.append(resume(plan, expected, number))
    say("\n".join(["", *table_lines(comparisons), "", *verdict_lines(comparisons)]))
    return not any(comparison.faults for comparison in comparisons)


def verdict_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The verdict, after the faults that it does not name."""
    faults = [f"{comparison.name}: {fault}" for comparison in comparisons for fault in comparison.faults]
    if not faults:
        return ["verdict: this run comes back"]
    if comparisons[0].faults:
        why = "two runs of it differ before anything is killed; try --training.deterministic true"
        return [*[f"  {fault}" for fault in faults], f"verdict: it cannot be told whether this run comes back: {why}"]
    return [*[f"  {fault}" for fault in faults[1:]], f"verdict: it does NOT come back: {faults[0]}"]


def run_uninterrupted(plan: Plan) -> Trace:
    """The run that is never stopped."""
    run_program(plan, UNINTERRUPTED, plan.num_processes)
    trace = read_trace(plan.folder / UNINTERRUPTED, plan.checkpoint_folder)
    if not {plan.saved_step, plan.killed_step, plan.steps} <= set(trace.saved_steps()):
        raise DrillError(f"the uninterrupted run saved steps {trace.saved_steps()} and no others; {tail_of(plan.folder / UNINTERRUPTED / LOG)}")
    return trace


def run_killed(plan: Plan) -> str:
    """The run that is killed in the midst of a save; what lies there then, in a sentence."""
    step = plan.folder / KILLED / "run" / plan.checkpoint_folder / f"step-{plan.killed_step}"
    staging = staging_of(step)
    run_program(plan, KILLED, plan.num_processes, staging)
    if not (plan.folder / KILLED / KILLED_FILE).exists():
        raise DrillError(f"the run ended, and no file of {staging} was ever waited for (os.fsync): it was not killed")
    files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())} if staging.is_dir() else {}
    saved = read_trace(plan.folder / KILLED, plan.checkpoint_folder).saved_steps()
    if not any(files.values()) or saved != [plan.saved_step]:
        raise DrillError(f"the kill missed the midst of a save: {staging} holds {', '.join(files) or 'nothing'}, and saved are steps {saved}")
    held = ", ".join(f"{name} ({size:,} bytes)" for name, size in files.items())
    return f"{staging.name} holds {held}; there is no {step.name}, and step-{plan.saved_step} is whole"


def compare_killed(plan: Plan, expected: Trace) -> Comparison:
    """What the killed run did until then, held against the uninterrupted one: the two have done the same so far."""
    found = read_trace(plan.folder / KILLED, plan.checkpoint_folder)
    comparison = Comparison("before the kill", range(1, max(found.by_step, default=0) + 1))
    compare_steps(expected, found, comparison)
    return comparison


def resume(plan: Plan, expected: Trace, num_processes: int) -> Comparison:
    """Go on from a copy of what the killed run left, and hold the rest of the run against the uninterrupted one."""
    name, same_layout, failed = RESUMED.format(num_processes), num_processes == plan.num_processes, ""
    shutil.copytree(plan.folder / KILLED / "run", plan.folder / name / "run")
    try:
        run_program(plan, name, num_processes)
    except DrillError as error:
        failed = str(error)
    found = read_trace(plan.folder / name, plan.checkpoint_folder)
    first = min(found.batches, default=plan.steps + 1)
    comparison = Comparison(f"resumed on {count_processes(num_processes)}", range(first, plan.steps + 1), {} if same_layout else plan.limits)
    if failed:
        comparison.faults.append(failed)
        return comparison
    if first != plan.saved_step + 1:
        comparison.faults.append(f"it went on with step {first}, though step {plan.saved_step} was saved")
    if [row["step"] for row in found.rows] != list(range(1, plan.steps + 1)):
        comparison.faults.append(f"metrics.jsonl holds steps {[row['step'] for row in found.rows]} instead of 1 to {plan.steps}")
    compare_steps(expected, found, comparison)
    compare_last_checkpoints(expected, found, plan.saved_step, comparison, same_layout)
    return comparison


def run_program(plan: Plan, name: str, num_processes: int, staging: Path | None = None) -> None:
    """Run train.py to its end, or until it is killed in the midst of writing ``staging``.

    Raises:
        DrillError: it failed by itself, or took too long; with the end of what it said.
    """
    place = plan.folder / name
    place.mkdir(exist_ok=True)
    log = place / LOG
    worker = ["-m", "tunelib.checkpoint.drill_worker", str(place), str(staging or ""), str(plan.program)]
    words = [*launcher_words(num_processes, place), *worker, *plan.words, "--job.dump_folder", str(place / "run")]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # our tunelib, whatever lies where one stands
    if num_processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_processes, 1)))
        environment |= {EXIT_CODE_FILE: str(place / "torchrun/exit_code"), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    with open(log, "wb") as output:
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        # A signal may come before there is anything that `ending` could end.
        started = subprocess.Popen([sys.executable, *words], env=environment, preexec_fn=die_with_parent, **how)
        with ending(started, gently=num_processes > 1):
            try:
                code = started.wait(plan.timeout_seconds)
            except subprocess.TimeoutExpired:
                limit = f"{plan.timeout_seconds:g} seconds (--timeout_seconds)"
                raise DrillError(f"the run {name} has not ended within {limit}; {tail_of(log)}") from None
    if code != 0 and not (place / KILLED_FILE).exists():
        raise DrillError(f"the run {name} ended by itself with exit code {code}; {tail_of(log)}")


def launcher_words(num_processes: int, place: Path) -> list[str]:
    """What comes before the worker on several processes; see run_train.sh."""
    if num_processes == 1:
        return []
    (place / "torchrun").mkdir()
    words = {"nnodes": 1, "nproc_per_node": num_processes, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    words |= {"role": "rank", "tee": 3, "local_ranks_filter": 0, "log_dir": place / "torchrun"}
    return ["-m", "tunelib.parallel.launch", *[str(word) for name, value in words.items() for word in (f"--{name}", value)]]


@contextlib.contextmanager
def ending(started: subprocess.Popen, gently: bool) -> Iterator[None]:
    """Have a program end with this block, however it is left.

    Args:
        gently: ask first: torchrun then ends its workers.
    """
    try:
        yield
    finally:
        if gently and started.poll() is None:
            started.terminate()
            deadline = time.monotonic() + SECONDS_TO_END
            while started.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        started.kill()
        started.wait()


def tail_of(log: Path) -> str:
    """The end of what a run said."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
    return "\n".join([f"the end of {log}:", *[f"  {line}" for line in lines]]) if lines else f"{log} is empty"


def check_room(folder: Path, num_copies: int) -> None:
    """Whether the disk has room for so many more runs and the killed one; raises DrillError."""
    needed = (1 + num_copies) * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DrillError(f"the drill takes about {needed / 2**20:,.0f} MiB more, and {free / 2**20:,.0f} MiB are free in {folder}; give --folder")


def count_processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
