"""What a run folder tells of its run: series by name, settings, samples, the summary. For pages and pictures; needs no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelib.config.load import read_written
from tunelib.errors import ConfigError, DataError
from tunelib.observe.metrics import METRICS_FILE, SAMPLES_FILE

Points = list[tuple[float, float]]
"""(step, value), in the order of the steps."""


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: of its folder; where several have the same one, with so much of the path as tells them apart.
        series: name in metrics.jsonl → its points; values that are not finite are left out.
        settings: the resolved TOML, by dotted key.
        samples: rows of samples.jsonl.
    """

    name: str
    folder: Path
    series: dict[str, Points]
    settings: dict[str, object]
    samples: list[dict[str, Any]]
    summary: str = ""

    @property
    def last_step(self) -> int:
        """The newest that any row tells of."""
        return int(max((points[-1][0] for points in self.series.values() if points), default=0))


def load_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs of these folders, in their order.

    Raises:
        ConfigError: a folder is no run's, or was given twice.
        DataError: metrics.jsonl has a line that is no row.
    """
    names = name_runs(folders)
    return [load_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def load_run(folder: Path, name: str) -> RunRecord:
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        inside = sorted(folder.glob("*/" + METRICS_FILE)) if folder.is_dir() else []
        hint = f"; did you mean {inside[0].parent}?" if inside else "; give a run's folder, which is outputs/<name of the config> by default"
        raise ConfigError(f"{folder} is no run folder: it has no {METRICS_FILE}{hint}")
    rows = read_rows(metrics)
    if not rows:
        raise DataError(f"{metrics} has no rows yet; wait for the first step that is logged (metrics.log_freq)")
    series: dict[str, Points] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(key, []).append((row["step"], float(value)))
    config, samples, summary = folder / "config.toml", folder / SAMPLES_FILE, folder / "summary.txt"
    return RunRecord(
        name,
        folder,
        series,
        read_written(config) if config.is_file() else {},
        [row for row in (read_rows(samples) if samples.is_file() else []) if {"prompt", "answer"} <= row.keys()],
        summary.read_text(encoding="utf-8", errors="replace") if summary.is_file() else "",
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that a run writes; one that is being written just now, the last, may be cut off.

    Raises:
        DataError: another line is no row, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] >= 0):
                raise ValueError("no object with a step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # without its end yet
                break
            way = "a run that resumes mends what a crash has left; else remove that line"
            raise DataError(f"{path}:{number}: is no row ({error}): {line[:60].decode(errors='replace')!r}; {way}") from None
        rows.append(row)
    return rows


def name_runs(folders: list[Path]) -> list[str]:
    """A name for each: that of its folder, with as many of the folders above as it takes to tell them apart."""
    whole = [folder.resolve() for folder in folders]
    for index, folder in enumerate(whole):
        if folder in whole[:index]:
            raise ConfigError(f"{folders[index]} is given twice; name each run once")
    for depth in range(1, max(len(folder.parts) for folder in whole) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
        if len(set(names)) == len(names):
            break
    return names


def differing_settings(runs: list[RunRecord]) -> list[tuple[str, list[object]]]:
    """Settings of which the runs do not all have the same value: the key, and each run's value; None where it is not set."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "job.dump_folder")
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return [(key, found) for key, found in values.items() if any(value != found[0] for value in found)]
