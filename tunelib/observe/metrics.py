"""metrics.jsonl, samples.jsonl and nonfinite.jsonl: a row per logged step, floats at full precision."""

import contextlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunelib import files

METRICS_FILE, SAMPLES_FILE, NONFINITE_FILE = "metrics.jsonl", "samples.jsonl", "nonfinite.jsonl"


class Sink(Protocol):
    """Somewhere else where the rows of metrics.jsonl go. It ends no run, and a slow one must not be waited for."""

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """From now on it holds these rows, whatever it held before."""

    def write(self, row: dict[str, Any]) -> None:
        """One row more."""

    def sync(self) -> None:
        """A checkpoint is about to be written, which stands for all rows so far."""

    def close(self) -> None:
        """The run is over."""


class PatientFile:
    """A file that grows. A disk that does not take its pieces is told once, and gets them later: they are not worth a run.

    Args:
        path: the file.
        content: what it holds at first.
        say: tells the user.
    """

    def __init__(self, path: Path, content: bytes, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._pending: deque[bytes] = deque()
        self._is_told = False
        self._file: io.FileIO | None = None
        self.replace(content)

    @property
    def pending(self) -> bytes:
        """What the disk has not taken yet."""
        return b"".join(self._pending)

    def replace(self, content: bytes) -> None:
        """Hold this and nothing else; raises OSError, and is then as it was."""
        if not self._path.exists() or self._path.read_bytes() != content:
            files.replace_file(self._path, content)
        if self._file is not None:
            self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._pending.clear()

    def append(self, piece: bytes) -> None:
        """Add one piece, at once where the disk has room."""
        self._pending.append(piece)
        self._give()

    def sync(self) -> None:
        """Wait until the disk has all pieces."""
        self._give()
        with self.bearing():
            os.fsync(self._opened().fileno())

    def close(self) -> None:
        """Sync, and say what is missing."""
        self.sync()
        self._opened().close()
        if self._pending:
            self._say(f"{self._path} lacks {len(self._pending)} rows, which could not be written")

    @contextlib.contextmanager
    def bearing(self) -> Iterator[None]:
        """Tell of an error of the disk, once until it takes pieces again, and go on."""
        try:
            yield
        except OSError as error:
            if not self._is_told:
                self._say(f"{self._path} cannot be written: {error.strerror}; its rows are kept, and written later")
            self._is_told = True

    def _opened(self) -> io.FileIO:
        assert self._file is not None, "opened by `replace`"
        return self._file

    def _give(self) -> None:
        with self.bearing():
            while self._pending:
                self._pending[0] = self._pending[0][self._opened().write(self._pending[0]) :]
                if not self._pending[0]:
                    self._pending.popleft()
            self._is_told = False


class RowWriter:
    """Appends rows to a .jsonl file, and hands them to sinks.

    Args:
        path: the file.
        resumed_step: rows of later steps, which the run will make again, are cut; None starts the file anew.
        active: False on ranks that do not write.
        say: tells the user.
        is_revalidated: the run will make the validation of ``resumed_step`` again, too, and its samples.
        sinks: hold the rows that the file holds.
    """

    def __init__(
        self,
        path: Path,
        resumed_step: int | None,
        active: bool,
        say: Callable[[str], None] = print,
        is_revalidated: bool = False,
        sinks: Callable[[], Sequence[Sink]] = tuple,
    ):
        self._path, self._say = path, say
        self._file: PatientFile | None = None
        self._sinks: Sequence[Sink] = ()
        if active:
            rows = _rows_up_to(path.read_bytes(), resumed_step, is_revalidated) if resumed_step is not None and path.exists() else []
            self._file = PatientFile(path, "".join(rows).encode(), say)
            self._sinks = sinks()
            self._begin_sinks(rows)

    def cut(self, step: int) -> None:
        """Leave out the rows of later steps, which the run will make again."""
        if self._file is not None:
            rows, is_shorter = list[str](), False
            with self._file.bearing():
                content = self._path.read_bytes() + self._file.pending
                rows = _rows_up_to(content, step)
                self._file.replace("".join(rows).encode())
                is_shorter = len(rows) < content.count(b"\n")
            if is_shorter:
                self._begin_sinks(rows)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, at once."""
        if self._file is not None:
            self._file.append((json.dumps(row, ensure_ascii=False) + "\n").encode())
            for sink in self._sinks:
                sink.write(row)

    def sync(self) -> None:
        """Wait until the disk has all rows: a checkpoint that is about to be written stands for them."""
        if self._file is not None:
            self._file.sync()
            for sink in self._sinks:
                sink.sync()

    def _begin_sinks(self, rows: list[str]) -> None:
        for sink in self._sinks:
            try:
                sink.begin([json.loads(row) for row in rows])
            except OSError as error:
                self._say(f"{type(sink).__name__} cannot begin anew ({error.strerror}): it keeps rows that were taken back from {self._path}")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            for sink in self._sinks:
                sink.close()


def _rows_up_to(content: bytes, step: int, is_revalidated: bool = False) -> list[str]:
    kept = []
    for line in content.decode(errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash has cut off
            row = json.loads(line)
            is_of_step = "lr" in row  # others stand for a look at the weights after it
            if row["step"] <= step and (row["step"] < step or is_of_step or not is_revalidated):
                kept.append(line + "\n")
    return kept
