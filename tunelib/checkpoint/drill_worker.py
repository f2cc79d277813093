"""A process of the drill (drill.py): train.py as it is, which notes the rows it takes and may be killed in the midst of a save.

    python -m tunelib.checkpoint.drill_worker FOLDER STAGING train.py CONFIG.toml [--section.key value …]

FOLDER gets ``pid-<rank>`` and ``batches-<rank>.jsonl``. Where STAGING is not empty, it is the staging folder of a checkpoint: the first rank that
waits for the disk (fsync) to have a file of it kills all ranks with SIGKILL instead. So the file is there, the step is not, and that moment is hit
however short a save is. Python's os.fsync is the only thing of the program that differs.
"""

import contextlib
import hashlib
import json
import os
import runpy
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tunelib.batch import IGNORED
from tunelib.data.loader import Step, TrainData
from tunelib.data.stream import StreamData

PID_FILE, BATCHES_FILE, KILLED_FILE = "pid-{}", "batches-{}.jsonl", "killed"


def main(folder: Path, staging: str, program: str, words: list[str]) -> None:
    rank = os.environ.get("RANK", "0")
    (folder / PID_FILE.format(rank)).write_text(str(os.getpid()))
    file = folder / BATCHES_FILE.format(rank)
    TrainData.step = note_rows(TrainData.step, file)  # type: ignore[method-assign, assignment]  # what train.py takes its steps from
    StreamData.step = note_rows(StreamData.step, file)  # type: ignore[method-assign, assignment]  # or from here
    if staging:
        os.fsync = kill_in_a_save(os.fsync, Path(staging), folder)  # type: ignore[assignment]  # all that we have give it a descriptor
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")


def note_rows(take_step: Callable[[Any, int], Step], file: Path) -> Callable[[Any, int], Step]:
    """A method that takes a step's batches, and appends the digests of their rows to a file: those of this data rank's share."""

    def step(self: TrainData | StreamData, number: int) -> Step:
        work = take_step(self, number)
        rows = [digest_row(*row) for batch in work.batches for row in zip(batch.tokens, batch.labels, batch.positions, strict=True)]
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": number, "share": self.share.rank, "rows": rows}) + "\n")
        return work

    return step


def digest_row(tokens: Tensor, labels: Tensor, positions: Tensor) -> str:
    """A digest of a row (S): its tokens, labels and positions up to the last that is no padding, whose length may depend on the other rows."""
    used = ((tokens != 0) | (labels != IGNORED)).nonzero()
    length = int(used[-1]) + 1 if len(used) else 0
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokens, labels, positions):
        digest.update(part[:length].numpy().tobytes())
    return digest.hexdigest()


def kill_in_a_save(fsync: Callable[[int], None], staging: Path, folder: Path) -> Callable[[int], None]:
    """An fsync that, for a file of the staging folder that holds something, kills the processes whose numbers are in ``folder``, its own last."""

    def kill_or_fsync(descriptor: int) -> None:
        if holds_data(descriptor, staging):
            (folder / KILLED_FILE).touch()
            pids = [int(path.read_text()) for path in folder.glob(PID_FILE.format("*"))]
            for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        fsync(descriptor)

    return kill_or_fsync


def holds_data(descriptor: int, folder: Path) -> bool:
    """Whether an open file is one of a folder's, and the folder holds bytes of it already."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not status.st_size or not folder.is_dir():
        return False
    return any(os.path.samestat(status, path.stat()) for path in folder.iterdir())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
