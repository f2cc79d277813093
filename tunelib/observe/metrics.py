"""metrics.jsonl, samples.jsonl and nonfinite.jsonl: a row per logged step, floats at full precision."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunelib import files

METRICS_FILE, SAMPLES_FILE, NONFINITE_FILE = "metrics.jsonl", "samples.jsonl", "nonfinite.jsonl"


class RowWriter:
    """Appends rows to a .jsonl file. A disk that does not take them is told once, and gets them later: they are not worth a run.

    Args:
        path: the file.
        resumed_step: rows of later steps, which the run will make again, are cut; None starts the file anew.
        active: False on ranks that do not write.
        say: tells the user.
    """

    def __init__(self, path: Path, resumed_step: int | None, active: bool, say: Callable[[str], None] = print):
        self._path, self._say = path, say
        self._file: io.FileIO | None = None
        self._pending = b""
        self._is_told = False
        if active:
            self._begin(path.read_bytes() if resumed_step is not None and path.exists() else b"", resumed_step or 0)

    def cut(self, step: int) -> None:
        """Leave out the rows of later steps, which the run will make again."""
        if self._file is not None:
            old = self._file
            with self._bearing():
                self._begin(self._path.read_bytes() + self._pending, step)
                self._pending = b""
                old.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, at once."""
        if self._file is not None:
            self._pending += (json.dumps(row, ensure_ascii=False) + "\n").encode()
            self._give()

    def sync(self) -> None:
        """Wait until the disk has all rows: a checkpoint that is about to be written stands for them."""
        if self._file is not None:
            self._give()
            with self._bearing():
                os.fsync(self._file.fileno())

    def _give(self) -> None:
        assert self._file is not None
        with self._bearing():
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._is_told = False

    @contextlib.contextmanager
    def _bearing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_told:
                self._say(f"{self._path} cannot be written: {error.strerror}; its rows are kept, and written later")
            self._is_told = True

    def _begin(self, content: bytes, step: int) -> None:
        rows = "".join(_rows_up_to(content, step)).encode()
        if not self._path.exists() or self._path.read_bytes() != rows:
            files.replace_file(self._path, rows)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            if self._pending:
                self._say(f"{self._path} lacks {self._pending.count(10)} rows, which could not be written")


def _rows_up_to(content: bytes, step: int) -> list[str]:
    kept = []
    for line in content.decode(errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash has cut off
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    return kept
