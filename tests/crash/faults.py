"""What goes wrong in a run, put in by the process itself before train.py begins; each function is named by a case of forks.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash.disk import arm, disarm

from tunelib.checkpoint.manager import CheckpointManager


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
    """Somebody clears the disk before a step."""
    before_step(rank, lambda number: Path(ballast).unlink() if number == step else None)


def before_step(rank: int, act: Callable[[int], None]) -> None:
    """Have rank 0 do something before each step."""
    import train

    take_step = train.train_step

    def step(model: Any, optimizer: Any, work: Any, *words: Any) -> tuple[float, float]:
        if rank == 0:
            act(work.number)
        return take_step(model, optimizer, work, *words)

    train.train_step = step
