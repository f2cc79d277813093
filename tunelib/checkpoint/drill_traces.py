"""What the runs of a drill left behind (metrics, digests of rows, the last checkpoint), and one held against another.

A difference is relative: 0 where all is equal bit for bit, infinite where something is missing or is not a number. Weights are measured by how far
training has moved them, so that a small learning rate hides nothing: |a − b| / |a − begin|, in L2 norms of a tensor.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tunelib import files
from tunelib.checkpoint.dcp_reader import SafeReader, load_tensors
from tunelib.checkpoint.drill_worker import BATCHES_FILE
from tunelib.checkpoint.state import read_run_state
from tunelib.errors import CheckpointError

BATCHES, LR, TOKENS, LOSS, GRAD_NORM = "batches", "lr", "tokens", "loss", "gradient norm"
WEIGHTS, OPTIMIZER, RANDOM_STATE = "weights", "optimizer", "random state"
COLUMNS = {LR: "lr", TOKENS: "tokens", LOSS: "loss", GRAD_NORM: "grad_norm"}
"""What is compared → its column of metrics.jsonl."""
KINDS = (BATCHES, *COLUMNS, WEIGHTS, OPTIMIZER, RANDOM_STATE)
LIMITS: dict[str, dict[str, float]] = {
    "float64": {LOSS: 1e-9, GRAD_NORM: 1e-9, WEIGHTS: 1e-9, OPTIMIZER: 1e-9},
    "float32": {LOSS: 1e-4, GRAD_NORM: 1e-3, WEIGHTS: 1e-2, OPTIMIZER: 1e-2},
    "bfloat16": {LOSS: 2e-2, GRAD_NORM: 1e-1, WEIGHTS: 0.2, OPTIMIZER: 0.2},
}
"""Coarsest type that a run computes in → the largest differences on another number of processes, which adds up in another order. Found on
models of 50,000 to 135 million weights: 1e-15; 4e-7 of the loss and 7e-5 of the weights' way; 6e-4 and 4e-2. Lost moments show as tenths."""
BYTES_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Trace:
    """What one run left.

    Attributes:
        rows: of metrics.jsonl, in their order.
        batches: digests of the rows that the process of this run took, sorted, by step; a killed run's last ones may be a part.
        checkpoints: the folder with the step folders.
    """

    rows: list[dict[str, Any]]
    batches: dict[int, list[str]]
    checkpoints: Path

    @property
    def by_step(self) -> dict[int, dict[str, Any]]:
        return {row["step"]: row for row in self.rows}

    def saved_steps(self) -> list[int]:
        """Steps whose folder is committed."""
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal() and files.has_manifest(path))


@dataclass
class Comparison:
    """A run held against the uninterrupted one.

    Attributes:
        name: of the run.
        steps: that were compared.
        limits: the largest differences that are still good; 0, bit for bit, for what is not named.
        differences: the largest there are, by kind.
        faults: what is not good, a sentence each.
    """

    name: str
    steps: range
    limits: Mapping[str, float] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, difference: float, sentence: str) -> None:
        """Take note of a difference, and of a fault where it is too large and the first of its kind."""
        before = self.differences.get(kind, 0.0)
        limit = self.limits.get(kind, 0.0)
        if difference > limit >= before:
            self.faults.append(sentence + (f" (relative difference {difference:.1e}, at most {limit:.0e})" if limit else ""))
        self.differences[kind] = max(before, difference)


def read_trace(place: Path, checkpoint_folder: str) -> Trace:
    """The trace of a run whose run folder is ``place / "run"``."""
    return Trace(list(read_lines(place / "run/metrics.jsonl")), merge_batches(place), place / "run" / checkpoint_folder)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl file, to its end or to a line that a SIGKILL has cut off; none where there is no file."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def merge_batches(place: Path) -> dict[int, list[str]]:
    """Step → the digests of all its rows, sorted, whichever process took them; processes that work on the same rows count once."""
    shares: dict[int, dict[int, list[str]]] = {}
    for file in sorted(place.glob(BATCHES_FILE.format("*"))):
        for line in read_lines(file):
            own = shares.setdefault(line["step"], {})
            if own.setdefault(line["share"], line["rows"]) != line["rows"]:
                own[line["share"]] = [f"two processes of share {line['share']} took different rows"]
    return {step: sorted(digest for rows in own.values() for digest in rows) for step, own in sorted(shares.items())}


def compare_steps(expected: Trace, found: Trace, comparison: Comparison) -> None:
    """Hold the rows and the metrics of the comparison's steps against the expected ones."""
    for step in comparison.steps:
        is_same = found.batches.get(step) == expected.batches.get(step)
        comparison.add(BATCHES, 0 if is_same else math.inf, f"step {step} trained on other rows")
        for kind, column in COLUMNS.items():
            then, now = (trace.by_step.get(step, {}).get(column) for trace in (expected, found))
            comparison.add(kind, relative_difference(then, now), f"{kind} of step {step} is {now} instead of {then}")


def compare_last_checkpoints(expected: Trace, found: Trace, begin: int, comparison: Comparison, same_layout: bool) -> None:
    """Hold a run's last checkpoint against the expected one.

    Args:
        begin: the step from which weights have moved.
        same_layout: whether each rank's random state must be the same too.
    """
    last = expected.saved_steps()[-1]
    if found.saved_steps() != expected.saved_steps():
        comparison.faults.append(f"steps {found.saved_steps()} are saved instead of {expected.saved_steps()}")
        return
    one, other = (trace.checkpoints / f"step-{last}" for trace in (expected, found))
    try:
        then, now = (vars(read_run_state(folder)) for folder in (one, other))
        for name in ("step", "tokens_seen", "identity", "passed_over"):
            if then[name] != now[name]:
                comparison.faults.append(f"state.json of step {last} says {name} = {now[name]} instead of {then[name]}")
        compare_tensors(one, other, expected.checkpoints / f"step-{begin}", comparison, same_layout)
    except CheckpointError as error:
        comparison.faults.append(str(error))


def compare_tensors(one: Path, other: Path, begin: Path, comparison: Comparison, same_layout: bool) -> None:
    """Hold the tensors of a step folder against those of another; raises CheckpointError where one cannot be read."""
    shapes = [{name: shape for name, shape in read_shapes(folder).items() if same_layout or kind_of(name) != RANDOM_STATE} for folder in (one, other)]
    if different := sorted(shapes[0].keys() ^ shapes[1].keys()):
        comparison.faults.append(f"{different[0]} is in one of {one} and {other} only")
        return
    for names in group_names({name: shape.numel() * dtype.itemsize for name, (shape, dtype) in shapes[0].items()}):
        then, now = (read_tensors(folder, {name: own[name] for name in names}) for folder, own in zip((one, other), shapes, strict=True))
        before = read_tensors(begin, {name: shapes[0][name] for name in names if kind_of(name) == WEIGHTS})
        for name in names:
            comparison.add(kind_of(name), tensor_difference(then[name], now[name], before.get(name)), f"{name} of the last checkpoint differs")


def read_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor of a step folder; raises CheckpointError."""
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(folder: Path, shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Some tensors of a step folder, whole; raises CheckpointError."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    if tensors:
        load_tensors(tensors, folder)
    return tensors


def kind_of(name: str) -> str:
    """Whose tensor it is, by its name in a checkpoint (state.py)."""
    return OPTIMIZER if name.startswith("optimizer.") else RANDOM_STATE if name.startswith("rng.") else WEIGHTS


def group_names(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in groups of about BYTES_AT_ONCE."""
    group, total = [], 0
    for name, size in sizes.items():
        group.append(name)
        total += size
        if total >= BYTES_AT_ONCE:
            yield group
            group, total = [], 0
    if group:
        yield group


def relative_difference(one: float | None, other: float | None) -> float:
    """Of two numbers; two that are missing are equal."""
    if one == other:
        return 0.0
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def tensor_difference(one: Tensor, other: Tensor, begin: Tensor | None = None) -> float:
    """The L2 norm of what differs, relative to that of ``one``, or to how far it is from ``begin``; infinite where there is no such measure."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    if not one.is_floating_point():
        return math.inf
    distance = torch.linalg.vector_norm(one.double() - other.double()).item()
    scale = torch.linalg.vector_norm(one.double() - (begin.double() if begin is not None else 0)).item()
    return distance / scale if scale and math.isfinite(distance) else math.inf


def table_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """A line per comparison: which steps, and the largest difference of each kind; and what was allowed, where that is not nothing."""
    rows = [["", "steps", *KINDS]]
    for comparison in comparisons:
        shown = [show_difference(comparison.differences.get(kind)) for kind in KINDS]
        steps = f"{comparison.steps.start}–{comparison.steps.stop - 1}" if comparison.steps else "none"
        rows.append([comparison.name, steps, *shown])
        if comparison.limits:
            rows.append(["  at most", "", *[f"{comparison.limits[kind]:.0e}" if kind in comparison.limits else "" for kind in KINDS]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show_difference(difference: float | None) -> str:
    """For a cell of the table."""
    if difference is None:
        return "–"
    return "equal" if difference == 0 else "DIFFERENT" if math.isinf(difference) else f"{difference:.1e}"
