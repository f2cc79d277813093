"""What goes wrong in a run, put in by the process itself before train.py begins; each function is named by a case of forks.py."""

import concurrent.futures
import contextlib
import ctypes
import itertools
import math
import os
import pkgutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from crash.disk import arm, disarm
from torch._dynamo.callback import callback_handler

import train
from tunelib.checkpoint.dcp_writer import Background
from tunelib.checkpoint.manager import CheckpointManager
from tunelib.data import index
from tunelib.parallel.reduce import local


def disk(rank: int, logs: str = "", **how: Any) -> None:
    """A disk that fails or waits in the whole run.

    Args:
        logs: a folder for what each rank does.
        how: for `disk.arm`.
    """
    arm(log=f"{logs}/{rank}" if logs else "", **how)


def disk_in_save(rank: int, step: int, at_rank: int = 0, counted: str = "", **how: Any) -> None:
    """A disk that fails while one rank saves one step, and nowhere else.

    Args:
        counted: a file that is told how many changes the save made.
        how: for `disk.arm`.
    """
    write = CheckpointManager._write

    def faulty_write(self: CheckpointManager, tensors: Any, state: Any, kind: str) -> Any:
        if state.step != step or rank != at_rank:
            return write(self, tensors, state, kind)
        arm(**how)
        try:
            return write(self, tensors, state, kind)
        finally:
            number = disarm()
            if counted:
                with open(counted, "w") as file:
                    file.write(str(number))

    CheckpointManager._write = faulty_write  # type: ignore[method-assign]


def signal_at(
    rank: int, call: str, count: int = 1, number: int = signal.SIGTERM, at_rank: int | None = None, wait: float | None = None, workers: int = 0
) -> None:
    """A signal to the process and what it has started, as a function is called.

    Args:
        call: the function, "train.train_step".
        count: which call of it, from 1.
        at_rank: which rank; None: every one that calls it.
        wait: seconds after which another signal comes; None: it is the only one.
        workers: processes that tokenise; 0: as many as the data is worth.
    """
    if workers:
        index._resolve_num_workers = lambda _: workers
    if at_rank in (None, rank):
        numbers = itertools.count(1)

        def before(*_: Any) -> None:
            if next(numbers) == count:
                os.killpg(os.getpgrp(), number)
                if wait is not None:
                    time.sleep(wait)
                    os.killpg(os.getpgrp(), number)

        call_before(call, before)


def leave_permissions_to_files(rank: int) -> None:
    """Without the privilege of root to read and write what no permission allows (Linux)."""
    if os.geteuid():
        return
    override, read_search, version_3 = 1, 2, 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for number in range(3):  # effective, permitted, inheritable
        sets[number] &= ~(1 << override | 1 << read_search)
    assert libc.capset(header, sets) == 0


def spoil_numbers(rank: int, what: str, steps: list[int], at_rank: int = 0) -> None:
    """Make one number NaN in some steps, each time once, on one rank.

    Args:
        what: "loss": of the step, while its gradients are finite; "gradient": of this rank, as it is clipped; "moment", "weight" or
            "unused weight", of a token that never comes: before the step.
    """
    take_step, left = train.train_step, list(steps)

    def faulty_step(model: Any, optimizer: Any, work: Any, *rest: Any) -> Any:
        if rank != at_rank or work.number not in left:
            return take_step(model, optimizer, work, *rest)
        left.remove(work.number)
        norm, embedding = model.model.norm.weight, model.model.embed_tokens.weight
        with contextlib.ExitStack() as after:
            if what == "loss":
                after.callback(model.register_forward_hook(lambda _module, _inputs, loss: loss + math.nan).remove)
            elif what == "gradient":
                after.enter_context(mock.patch.object(train, "clip_gradients", clip_spoiled))
            else:
                spoil({"moment": optimizer.state[norm].get("exp_avg"), "weight": norm.detach(), "unused weight": embedding.detach()}[what])
            return take_step(model, optimizer, work, *rest)

    clip = train.clip_gradients

    def clip_spoiled(parameters: Any, *rest: Any) -> Any:
        parameters = list(parameters)
        spoil(parameters[-1].grad)
        return clip(parameters, *rest)

    def spoil(tensor: Any) -> None:
        local(tensor).view(-1)[-1:] = math.nan

    train.train_step = faulty_step


def call_before(call: str, act: Callable[..., None]) -> None:
    """Have something done whenever a function is called, before it."""
    path, name = call.rsplit(".", 1)
    holder = pkgutil.resolve_name(path)
    function = getattr(holder, name)

    def with_act(*words: Any, **named: Any) -> Any:
        act(*words)
        return function(*words, **named)

    setattr(holder, name, with_act)


def signal_in_compilation(rank: int, comes: bool) -> None:
    """A signal to the process as layers begin to be compiled; the warnings that torch makes then are none of ours.

    Args:
        comes: False: the warnings alone.
    """
    warnings.simplefilter("default")

    def stop(_: Any) -> None:
        callback_handler.remove_start_callback(stop)
        os.kill(os.getpid(), signal.SIGTERM)

    if comes:
        callback_handler.register_start_callback(stop)


def no_room_from(rank: int, step: int, disk: str, leave: int, until: int | None = None) -> None:
    """Somebody fills the disk before a step, and clears it before another."""
    from crash.test_disk import fill

    def act(number: int) -> None:
        if number == step:
            fill(Path(disk), leave)
        elif number == until:
            (Path(disk) / "ballast").unlink()

    before_step(rank, act)


def room_again(rank: int, step: int, ballast: str) -> None:
    """Somebody clears the disk before a step, when what is saved in the background has met the full one."""
    start, begun = Background.start, []

    def start_and_remember(self: Background, *words: Any) -> None:
        start(self, *words)
        begun.append(self._pending)

    Background.start = start_and_remember  # type: ignore[method-assign]

    def clear(number: int) -> None:
        if number == step:
            concurrent.futures.wait(begun)
            Path(ballast).unlink()

    before_step(rank, clear)


def before_step(rank: int, act: Callable[[int], None]) -> None:
    """Have rank 0 do something before each step."""
    take_step = train.train_step

    def step(model: Any, optimizer: Any, work: Any, *words: Any) -> tuple[float, float]:
        if rank == 0:
            act(work.number)
        return take_step(model, optimizer, work, *words)

    train.train_step = step


def signal_in_load(rank: int) -> None:
    """SIGTERM comes while a checkpoint is loaded."""
    from tunelib.checkpoint.dcp_reader import SafePlanner

    set_up = SafePlanner.set_up_planner

    def set_up_planner(self: SafePlanner, *words: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        set_up(self, *words, **more)

    SafePlanner.set_up_planner = set_up_planner  # type: ignore[method-assign]
