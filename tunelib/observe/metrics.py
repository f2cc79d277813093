"""metrics.jsonl, samples.jsonl and nonfinite.jsonl: a row per logged step, floats at full precision."""

import json
from pathlib import Path
from typing import IO, Any

from tunelib import files

METRICS_FILE, SAMPLES_FILE, NONFINITE_FILE = "metrics.jsonl", "samples.jsonl", "nonfinite.jsonl"


class RowWriter:
    """Appends rows to a .jsonl file.

    Args:
        path: the file.
        resumed_step: rows of later steps, which the run will make again, are cut; None starts the file anew.
        active: False on ranks that do not write.
    """

    def __init__(self, path: Path, resumed_step: int | None, active: bool):
        self._path = path
        self._file: IO[str] | None = None
        if active:
            self._begin(_rows_up_to(path, resumed_step) if resumed_step is not None and path.exists() else [])

    def cut(self, step: int) -> None:
        """Leave out the rows of later steps, which the run will make again."""
        if self._file is not None:
            self._file.close()
            self._begin(_rows_up_to(self._path, step))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, at once."""
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def _begin(self, rows: list[str]) -> None:
        files.replace_file(self._path, "".join(rows))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _rows_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # a line that a crash cut off is the last one
    return kept
