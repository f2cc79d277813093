"""What goes wrong in a run, put in by the process itself before train.py begins; each function is named by a case of forks.py."""

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
