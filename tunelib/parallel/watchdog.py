"""A watch over what may hang: who has not arrived, and where every process stands, go to files; then the run ends with exit code 124."""

import contextlib
import datetime
import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from tunelib.config.schema import Comm
from tunelib.errors import HUNG
from tunelib.parallel.reduce import SAVES, gather_objects
from tunelib.parallel.runtime import Runtime, end_at_once

HANG_FOLDER = "hang"
SECONDS_FOR_OTHERS = 5.0
"""How long the others have to say where they stand, once one has found that something hangs."""
COLLECTIVES_LAST_LONGER = 60
"""By how many seconds a collective outlasts the watch, which has more to say than its error."""
TIMES_LONGEST_STEP = 5


class Watchdog:
    """Ends the process when a block of work lasts too long; a thread looks once a second.

    Args:
        section: the limits.
        folder: of the run; what is known of a hang goes to its folder "hang", a file for each rank.
    """

    def __init__(self, section: Comm, folder: Path, runtime: Runtime):
        self._section, self._folder, self._rank = section, folder / HANG_FOLDER, runtime.rank
        if runtime.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)  # it speaks of an earlier start
        self._processes = gather_objects((socket.gethostname(), os.getpid()))
        self._what, self._deadline, self._limit = "", float("inf"), 0.0
        self._longest_step = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextlib.contextmanager
    def step(self, number: int, is_first: bool) -> Iterator[None]:
        """A block that is a training step; the first one, which may compile, has the time of what is outside of steps.

        A step may last five times as long as the longest so far, if that is more than ``train_timeout_seconds``.
        """
        seconds = max(self._section.train_timeout_seconds, TIMES_LONGEST_STEP * self._longest_step)
        begun = time.monotonic()
        with self.watch(f"step {number}", max(seconds, self._section.init_timeout_seconds) if is_first else seconds):
            yield
        self._longest_step = max(self._longest_step, time.monotonic() - begun)

    @contextlib.contextmanager
    def watch(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """A block that must end within some seconds, by default ``init_timeout_seconds``."""
        limit = seconds if seconds is not None else float(self._section.init_timeout_seconds)
        before = self._what, self._deadline, self._limit
        self._what, self._limit, self._deadline = what, limit, time.monotonic() + limit
        _limit_collectives(limit + COLLECTIVES_LAST_LONGER)
        try:
            yield
        finally:
            self._what, self._deadline, self._limit = before
            _limit_collectives(self._section.init_timeout_seconds + COLLECTIVES_LAST_LONGER)  # what is outside of all blocks may take as long

    def renew(self) -> None:
        """The block in hand has got on, and has as long again."""
        if self._what:
            self._deadline = time.monotonic() + self._limit

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, self._section.train_timeout_seconds / 4)):
            if time.monotonic() > self._deadline:
                self._end(f"{self._what} has not ended within {self._limit:.0f} seconds")

    def _end(self, what: str) -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with open(self._folder / f"rank-{self._rank}.txt", "w") as file:
                file.write(f"rank {self._rank}: {what}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(SECONDS_FOR_OTHERS)
        said = {rank for rank in range(len(self._processes)) if (self._folder / f"rank-{rank}.txt").exists()}
        silent = [rank for rank in range(len(self._processes)) if rank not in said]
        if self._rank == min(said, default=self._rank):
            who = f"; nothing is heard of rank {', '.join(map(str, silent))}, which has stopped or works on something else" if silent else ""
            way = "; if it was only slow, raise comm.train_timeout_seconds" if what.startswith("step") else ""
            message = f"error: {what}{who}{way}. Where each rank stands is in {self._folder}"
            print(message, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                (self._folder / "summary.txt").write_text(message + "\n")
            for rank in silent:
                self._kill(rank)
        end_at_once(HUNG)

    def _kill(self, rank: int) -> None:
        """End a process of this run on this machine that does not answer: the launcher would wait for it."""
        host, process = self._processes[rank]
        if host == socket.gethostname():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)


def _limit_collectives(seconds: float) -> None:
    """For the groups of this process that take part in steps: those of a mesh, which torch makes with half an hour each, too."""
    if dist.is_initialized():
        from torch.distributed.distributed_c10d import _set_pg_timeout, _world

        for group in _world.pg_map:
            if group.group_desc != SAVES:
                _set_pg_timeout(datetime.timedelta(seconds=seconds), group)
