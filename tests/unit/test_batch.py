"""A batch is what the drawing in its docstring says."""

import dataclasses

import numpy as np
import pytest
import torch
from unit.samples import make_index

from tunelib.batch import IGNORED, Batch
from tunelib.data.loader import build_batch


def make_batch() -> Batch:
    """The docstring's row: documents of 3, 2 and 1 positions and padding to 8; the third label of b0 … is not trained."""
    index = make_index([3, 2, 1], trained=[[True] * 3, [False, True], [True]])
    return build_batch([index.read_row(np.arange(3))], seq_len=8, packing=True)


def test_row_is_the_one_in_the_docstring() -> None:
    batch = make_batch()
    assert batch.tokens[0, :6].tolist() == [0, 1, 2, 1000, 1001, 2000]
    assert batch.labels[0].tolist() == [1, 2, 3, IGNORED, 1002, 2001, IGNORED, IGNORED]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert batch.document_lengths == (3, 2, 1, 2)


def test_batch_moves_whole_and_is_frozen() -> None:
    batch = make_batch()
    moved = batch.to(torch.device("meta"))
    assert (moved.tokens.device.type, moved.labels.device.type, moved.positions.device.type) == ("meta",) * 3
    assert moved.document_lengths == batch.document_lengths
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.document_lengths = ()  # type: ignore[misc]  # that is the point
