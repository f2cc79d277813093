"""Where the time of a step goes: traces of torch.profiler, and a table of its phases; on a GPU also where memory goes.

Nothing is measured, and nothing waited for, in steps that are not profiled.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tunelib.config.schema import Profiling
from tunelib.errors import ConfigError
from tunelib.files import replace_file
from tunelib.parallel.runtime import Runtime

MARK = "tunelib: "
COMMUNICATION = ("gloo:", "nccl:")
"""How torch names what its process groups do."""
SNAPSHOT_EVENTS = 100_000
TABLE_FILE = "where_time_went.txt"


@contextlib.contextmanager
def mark(phase: str) -> Iterator[None]:
    """What happens inside is a phase of the step: data, forward, backward, optimizer, saving, validation. In a profiled step a GPU is waited for."""
    with record_function(MARK + phase):
        yield
        if torch.autograd._profiler_enabled() and torch.cuda.is_available():
            torch.cuda.synchronize()


class Profiler:
    """Profiles every ``profile_freq``-th step.

    Args:
        folder: the run folder.
        say: tells the user.

    Raises:
        ConfigError: memory snapshots where there is no GPU.
    """

    def __init__(self, section: Profiling, folder: Path, runtime: Runtime, say: Callable[[str], None] = print):
        self._section, self._folder, self._runtime, self._say = section, folder / section.save_traces_folder, runtime, say
        self._active: tuple[int, profile] | None = None
        if section.enable_memory_snapshot:
            if runtime.device.type != "cuda":
                raise ConfigError("profiling.enable_memory_snapshot: snapshots are of a GPU's memory, and there is none here")
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)

    def begin(self, step: int) -> None:
        """A step begins; profile it if it is due. One that was given up for another has ended."""
        self.end()
        if self._section.enable_profiling and step % self._section.profile_freq == 0:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._runtime.device.type == "cuda" else [])]
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler's library writes its own lines among the steps
            self._active = (step, profile(activities=activities))
            self._active[1].start()

    def end(self) -> None:
        """The step has ended: write its trace, and the table of rank 0. A disk that does not take them is told, and stops nothing."""
        if self._active is None:
            return
        (step, profiled), self._active = self._active, None
        profiled.stop()
        folder = self._folder / f"step-{step}"
        table = phase_table(step, profiled)
        if self._runtime.is_main:
            self._say(table)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(folder / f"rank-{self._runtime.rank}.json.gz"))
            if self._runtime.is_main:
                replace_file(folder / TABLE_FILE, table + "\n")
            if self._section.enable_memory_snapshot:
                torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank-{self._runtime.rank}.pickle"))
        except OSError as error:
            lost = f"{folder} cannot be written: {error.strerror}; the profile of step {step} on rank {self._runtime.rank} is lost"
            print(lost, file=sys.stderr, flush=True)  # the user's screen shows rank 0 alone, and folders may be a machine's own

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._active is not None:  # a step that was broken off
            self._active[1].stop()
        if self._section.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)


def phase_table(step: int, profiled: Any) -> str:
    """Seconds of each phase of a profiled step, and of communication inside them, as text."""
    spans: dict[str, list[tuple[float, float]]] = {}
    events = list(profiled.events())
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith(MARK):
            spans.setdefault(event.name.removeprefix(MARK), []).append(span)
        elif event.name.startswith(COMMUNICATION):
            spans.setdefault("communication", []).append(span)
    total = max((event.time_range.end for event in events), default=0) - min((event.time_range.start for event in events), default=0)
    communication = covered(spans.pop("communication", []))
    seconds = {phase: covered(own) for phase, own in spans.items()}
    seconds["rest"] = max(total - sum(seconds.values()), 0.0)
    width = max(map(len, (*seconds, "communication")))
    lines = [f"step {step}: {total / 1e6:.3f} s while profiled"]
    lines += [f"  {phase:{width}} {time / 1e6:9.3f} s {time / max(total, 1):6.1%}" for phase, time in seconds.items()]
    if communication:
        lines.append(f"  {'communication':{width}} {communication / 1e6:9.3f} s {communication / max(total, 1):6.1%}, inside of the above")
    return "\n".join(lines)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
