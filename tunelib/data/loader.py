"""Rows to batches: which rows a step trains on, and the micro-batches of one data rank.

Step s takes rows (s − 1)·G … s·G − 1 of the endless sequence epoch 0, epoch 1, …, where G is the global batch; with
``dataset.last_batch = "drop"`` each epoch is first cut to a multiple of G rows. Nothing here
depends on how many ranks there are: a rank is handed its share of a step's rows at the end. There is no state but the step; a thread
makes the next one's rows while a step trains.
"""

import bisect
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from tunelib.batch import IGNORED, Batch
from tunelib.data.encode import read_ids, read_trained
from tunelib.data.index import Index
from tunelib.data.mix import build_mix, describe_mix, seeded_random
from tunelib.data.packing import EpochPlan, plan_epoch, plan_in_order
from tunelib.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which part of every batch a data rank works on: rank ``rank`` of ``num_ranks``, in micro-batches of ``rows`` rows."""

    rank: int
    num_ranks: int
    rows: int


@dataclass(frozen=True)
class Step:
    """What one rank does in one step. ``num_trained`` and ``num_tokens`` count the whole step's, over all ranks."""

    number: int
    batches: list[Batch]
    num_trained: int
    num_tokens: int
    epoch: float


class TrainData:
    """The training rows of every step.

    Args:
        index: the documents.
        seq_len: positions per row.
        packing: several documents per row.
        seed: of the order.
        global_batch_size: rows per step.
        share: this rank's part.
        last_batch: "fill" or "drop": what becomes of an epoch's last rows where they are no whole batch.

    Attributes:
        last_step: the run's, set from outside; nothing is made ahead beyond it.

    Raises:
        DataError: with "drop", an epoch has fewer rows than a batch; or a source has no document.
    """

    def __init__(self, index: Index, seq_len: int, packing: bool, seed: int, global_batch_size: int, share: Share, last_batch: str = "fill"):
        self.index, self.seq_len, self.packing, self.seed = index, seq_len, packing, seed
        self.global_batch_size, self.share, self.last_batch = global_batch_size, share, last_batch
        self.mix = build_mix(index)
        self._plans: dict[int, EpochPlan] = {}
        self._epoch_ends: list[int] = []  # rows before the end of epoch 0, 1, …
        self._planning = threading.RLock()
        self._maker = ThreadPoolExecutor(1, "rows of the next step")
        self._ahead: tuple[int, Future[Step]] | None = None
        self.last_step: int | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name → value of everything that decides which rows a step has."""
        order = {"dataset.packing": self.packing, "training.seed": self.seed, "training.global_batch_size": self.global_batch_size}
        consequences = {
            "documents": len(self.index),
            "documents taken of each source": list(self.mix.takes),
            "tokens": [source.facts.tokens_digest for source in self.index.sources],
        }
        return {**self.index.fingerprint, **order, "dataset.last_batch": self.last_batch, "consequences": consequences}

    @property
    def notes(self) -> list[str]:
        """What a person should know of the order: each source's share, how full rows are, and rows left out."""
        plan = self._plan(0)
        tokens = int(self.index.lengths[plan.documents].sum())
        fill = f"{len(plan):,} rows an epoch, {tokens / (len(plan) * self.seq_len):.2%} full"
        left_out = len(plan) - self._rows_in(plan)
        return [*describe_mix(self.index, self.mix), fill + (f"; the last {left_out} are left out" if left_out else "")]

    def documents_of_epoch(self, epoch: int) -> np.ndarray:
        """The documents of an epoch, in the order of its rows."""
        return self._plan(epoch).documents

    def steps_in_epochs(self, epochs: int) -> int:
        """Steps that take all of so many epochs, the last batch filled from the next."""
        with self._planning:
            while len(self._epoch_ends) < epochs:
                self._plan_next_epoch()
        return -(-self._epoch_ends[epochs - 1] // self.global_batch_size)

    def epochs_after(self, step: int) -> int:
        """Whole epochs finished when a step has ended."""
        return bisect.bisect_right(self._ends_up_to(step * self.global_batch_size), step * self.global_batch_size)

    def rows_of(self, step: int) -> list[tuple[int, np.ndarray]]:
        """(epoch, documents) of each row of a step, which is counted from 1; the same on every rank."""
        rows = []
        for number in range((step - 1) * self.global_batch_size, step * self.global_batch_size):
            epoch = bisect.bisect_right(self._ends_up_to(number + 1), number)
            first = self._epoch_ends[epoch - 1] if epoch else 0
            rows.append((epoch, self._plan(epoch).row(number - first)))
        return rows

    def documents_of(self, step: int) -> list[str]:
        """File and line of each document of a step, over all ranks."""
        return [self.index.where(document) for _, row in self.rows_of(step) for document in row.tolist()]

    def step(self, number: int) -> Step:
        """This rank's micro-batches of a step, which is counted from 1. Those of the next are made while this one trains."""
        made = self._ahead[1].result() if self._ahead is not None and self._ahead[0] == number else self._make(number)
        more = self.last_step is None or number < self.last_step
        self._ahead = (number + 1, self._maker.submit(self._make, number + 1)) if more else None
        return made

    def _make(self, number: int) -> Step:
        rows = self.rows_of(number)
        documents = [row for _, row in rows]
        done = number * self.global_batch_size
        epoch = self.epochs_after(number)
        first = self._epoch_ends[epoch - 1] if epoch else 0
        return Step(
            number=number,
            batches=[self._build(micro) for micro in deal_rows(documents, self.share)],
            num_trained=int(sum(self.index.num_trained[row].sum() for row in documents)),
            num_tokens=int(sum(self.index.lengths[row].sum() for row in documents)),
            epoch=epoch + ((done - first) / (self._epoch_ends[epoch] - first) if done > first else 0.0),
        )

    def _build(self, rows: list[np.ndarray]) -> Batch:
        return build_batch([self.index.read_row(row) for row in rows], self.seq_len, self.packing)

    def _ends_up_to(self, rows: int) -> list[int]:
        with self._planning:
            while not self._epoch_ends or self._epoch_ends[-1] < rows:
                self._plan_next_epoch()
            return self._epoch_ends

    def _plan_next_epoch(self) -> None:
        epoch = len(self._epoch_ends)
        self._epoch_ends.append((self._epoch_ends[-1] if epoch else 0) + self._rows_in(self._plan(epoch)))

    def _rows_in(self, plan: EpochPlan) -> int:
        """Rows of an epoch that are trained on."""
        rows = len(plan) // self.global_batch_size * self.global_batch_size if self.last_batch == "drop" else len(plan)
        if not rows:
            raise DataError(
                f"an epoch has {len(plan)} rows, less than training.global_batch_size = {self.global_batch_size}, and dataset.last_batch "
                'is "drop", so nothing is left; set it to "fill", or take a smaller batch'
            )
        return rows

    def _plan(self, epoch: int) -> EpochPlan:
        with self._planning:
            if epoch not in self._plans:
                for old in sorted(self._plans)[:-1]:  # two are enough: a batch may lie across a border
                    del self._plans[old]
                documents, random = self.mix.documents(self.seed, epoch), seeded_random(self.seed, epoch)
                self._plans[epoch] = plan_epoch(documents, self.index.lengths, self.seq_len, self.packing, random)
            return self._plans[epoch]


class HeldOutData:
    """The validation rows, in the order of the file, filled up with empty rows so that every rank has as many."""

    def __init__(self, index: Index, seq_len: int, packing: bool, share: Share):
        self.index, self.seq_len, self.packing, self.share = index, seq_len, packing, share

    @cached_property
    def num_trained(self) -> int:
        """Trained tokens over all ranks."""
        return int(self.index.num_trained.sum())

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches."""
        plan = plan_in_order(self.index.lengths, self.seq_len, self.packing)
        rows = [plan.row(number) for number in range(len(plan))]
        together = self.share.rows * self.share.num_ranks
        rows += [np.empty(0, dtype=np.int64)] * (-len(rows) % together)
        for first in range(0, len(rows), together):
            for micro in deal_rows(rows[first : first + together], self.share):
                yield build_batch([self.index.read_row(row) for row in micro], self.seq_len, self.packing)


def deal_rows(rows: list[T], share: Share) -> list[list[T]]:
    """A rank's micro-batches out of all rows of a batch: consecutive rows stay together."""
    per_rank = len(rows) // share.num_ranks
    own = rows[share.rank * per_rank : (share.rank + 1) * per_rank]
    return [own[first : first + share.rows] for first in range(0, len(own), share.rows)]


def build_batch(rows: Sequence[Sequence[np.ndarray]], seq_len: int, packing: bool) -> Batch:
    """Rows of documents as tensors; without packing no wider than the longest row. Labels are shifted here, once.

    Args:
        rows: the documents of each row, marked as in `data/encode.py`: n + 1 tokens for n positions.
    """
    width = seq_len if packing else max(1, *(sum(len(document) - 1 for document in row) for row in rows))
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    document_lengths: list[int] = []
    for number, row in enumerate(rows):
        place = 0
        for marked in row:
            length = len(marked) - 1
            here = slice(place, place + length)
            tokens[number, here] = read_ids(marked[:-1])
            labels[number, here] = np.where(read_trained(marked[1:]), marked[1:], IGNORED)
            positions[number, here] = np.arange(length)
            document_lengths.append(length)
            place += length
        if place < width:
            positions[number, place:] = np.arange(width - place)
            document_lengths.append(width - place)
    to_tensor = torch.from_numpy
    return Batch(to_tensor(tokens), to_tensor(labels), to_tensor(positions), tuple(document_lengths))
