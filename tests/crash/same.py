"""Runs that must be the same, bit for bit; and the tensors of a checkpoint."""

from pathlib import Path

import torch
from conftest import Run

COMPARED = ("step", "epoch", "lr", "loss", "grad_norm", "tokens", "validation_loss", "passed_over")


def check_same_run(found: Run, expected: Run) -> None:
    """All rows but for their times, all samples, and the exported weights."""
    assert rows_of(found) == rows_of(expected)
    assert found.samples() == expected.samples()
    check_same_tensors(found.weights(), expected.weights())


def rows_of(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what is another time another."""
    return [{name: row[name] for name in COMPARED if name in row} for row in run.rows()]


def check_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, with the same numbers."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step folder."""
    from tunelib.checkpoint.dcp_reader import SafeReader, load_tensors

    metadata = SafeReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    load_tensors(tensors, folder)
    return tensors


def step_names(run: Run) -> list[str]:
    """What lies in a run's checkpoint folder."""
    return sorted(path.name for path in (run.folder / "checkpoint").iterdir())
