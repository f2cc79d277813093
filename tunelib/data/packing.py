"""Documents to rows: one epoch's order, a pure function of (seed, epoch, documents, lengths) (law 2).

    permutation(seed, epoch) → windows of WINDOW documents → best-fit packing in each → all rows shuffled

Best fit puts the longest documents first, each into the fullest row that still has room. A window bounds the work per document;
its last row is packed again with the next window, since of rows of 32,768 positions short documents fill no more than twenty.
"""

import bisect
import itertools
from dataclasses import dataclass

import numpy as np

WINDOW = 4096


@dataclass(frozen=True)
class EpochPlan:
    """The rows of one epoch: row r holds ``documents[bounds[r]:bounds[r + 1]]``, in that order."""

    documents: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> np.ndarray:
        """The documents of a row."""
        return self.documents[self.bounds[number] : self.bounds[number + 1]]


def plan_epoch(documents: np.ndarray, lengths: np.ndarray, seq_len: int, packing: bool, random: np.random.RandomState) -> EpochPlan:
    """The rows of an epoch, each of its documents in exactly one of them.

    Args:
        documents: those of the epoch; one may stand there several times.
        lengths: positions of each document of the index, none above ``seq_len``.
        packing: False gives each document a row of its own.
    """
    order = documents[random.permutation(len(documents))]
    if not packing:
        return EpochPlan(order, np.arange(len(order) + 1))
    plan = _pack_windows(order, lengths, seq_len)
    return _reorder(plan, random.permutation(len(plan)))


def plan_in_order(lengths: np.ndarray, seq_len: int, packing: bool) -> EpochPlan:
    """Rows without any shuffling, for validation."""
    order = np.arange(len(lengths))
    return _pack_windows(order, lengths, seq_len) if packing else EpochPlan(order, np.arange(len(order) + 1))


def pack_best_fit(documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Rows of at most ``seq_len`` positions that hold all the documents, by best fit decreasing."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted
    for document in documents[np.argsort(-lengths[documents], kind="stable")].tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(document)
        else:
            free, row = seq_len, len(rows)
            rows.append([document])
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


def _pack_windows(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> EpochPlan:
    """Rows of each window of documents in turn; the row that a window opens last, and seldom fills, is packed again with the next."""
    documents, sizes = [], []
    left = order[:0]
    for first in range(0, len(order), WINDOW):
        rows = pack_best_fit(np.concatenate([left, order[first : first + WINDOW]]), lengths, seq_len)
        if first + WINDOW < len(order):
            left = np.array(rows.pop())
        documents.append(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64))
        sizes.append(np.fromiter(map(len, rows), dtype=np.int64))
    return EpochPlan(np.concatenate(documents), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def _reorder(plan: EpochPlan, order: np.ndarray) -> EpochPlan:
    """The same rows in another order."""
    firsts, sizes = plan.bounds[:-1][order], np.diff(plan.bounds)[order]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return EpochPlan(plan.documents[np.arange(bounds[-1]) + np.repeat(firsts - bounds[:-1], sizes)], bounds)
