"""Training rows read from a Hub data set while training, for data that is too large to fetch first.

Each data rank reads a share of the stream, a window of documents at a time: encoded, cut, packed by best fit, rows shuffled. What
this gives up: the order depends on the number of data ranks, documents move only within their window, and there is no epoch whose
end could be told beforehand. A rank whose share ends begins it again, alone, so that smaller shares are seen more often.
"""

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunelib.data.build import COLUMNS, Builder, Facts, check_facts
from tunelib.data.encode import Encoder, Reading, read_trained
from tunelib.data.index import FoundSource, describe_facts
from tunelib.data.loader import Share, Step, build_batch, deal_rows
from tunelib.data.mix import seeded_random
from tunelib.data.packing import pack_best_fit
from tunelib.errors import DataError

if TYPE_CHECKING:
    import datasets

WINDOW = 1024


@dataclass(frozen=True)
class Ranks:
    """How the data ranks speak with each other; both are collective.

    Attributes:
        agree: raises on every rank what any of them hands over.
        gather: every rank's value, by rank.
    """

    agree: Callable[[BaseException | None], None]
    gather: Callable[[Any], list[Any]]


class StreamData:
    """The training rows of every step, read when they are needed; steps can only be taken in order.

    Args:
        found: the stream, and the format of its rows.
        reading: how rows become documents.
        fingerprint: name → value of what decides the documents.
        seq_len: positions per row.
        too_long: "truncate", "split", "drop" or "error".
        packing: several documents per row.
        seed: of the order inside a window.
        global_batch_size: rows per step, over all ranks.
        share: this rank's part.
        ranks: all of them.
    """

    def __init__(
        self,
        found: FoundSource,
        reading: Reading,
        fingerprint: dict[str, Any],
        seq_len: int,
        too_long: str,
        packing: bool,
        seed: int,
        global_batch_size: int,
        share: Share,
        ranks: Ranks,
    ):
        from datasets.distributed import split_dataset_by_node

        assert found.opened.dataset is not None, "a stream is a Hub data set"
        self.found, self.reading, self.seq_len, self.too_long, self.packing, self.seed = found, reading, seq_len, too_long, packing, seed
        self.global_batch_size, self.share, self._ranks = global_batch_size, share, ranks
        self.facts = Facts(found.format)
        self._encoder = Encoder(reading)
        self._stream: datasets.IterableDataset = split_dataset_by_node(found.opened.dataset, share.rank, share.num_ranks)
        self._opened = dataclasses.replace(found.opened, files=(f"{found.opened.files[0]} of rank {share.rank}",))
        order = {"dataset.packing": packing, "training.seed": seed, "training.global_batch_size": global_batch_size}
        self.fingerprint = {**fingerprint, **order, "dataset.streaming": True, "data ranks": share.num_ranks}
        self._start_of_pass = copy.deepcopy(self._stream.state_dict())
        self._number, self._passes, self._num_rows_read = 0, 0, 0
        self._window = self._place()
        self._iterator: Iterator[dict[str, Any]] = iter(self._stream)
        self._rows: list[list[np.ndarray]] = []
        self._taken = 0

    @property
    def notes(self) -> list[str]:
        """What a person should know beforehand."""
        name, ranks = self.found.opened.name, self.share.num_ranks
        notes = [f"{name}: streamed; the order depends on the number of data ranks, {ranks} now, and the run can only be resumed on as many"]
        num_shards = getattr(self.found.opened.dataset, "num_shards", 1)
        if num_shards % ranks:
            notes.append(
                f"{name}: {num_shards} files cannot be dealt out evenly: each of the {ranks} data ranks reads all and keeps one row in {ranks}"
            )
        return notes

    @property
    def report(self) -> list[str]:
        """What a person should know of the documents that this rank has read."""
        lines = describe_facts(self.found, self.facts, self.seq_len, self.too_long)
        return [f"{self.found.opened.name}: {self.facts.num_read:,} documents read by rank {self.share.rank}, in {self._passes + 1} passes", *lines]

    def state(self) -> dict[str, Any]:
        """Where this rank's stream stands, as JSON: the beginning of its window, and how many of the window's rows were taken."""
        return {**self._window, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; the window is read again.

        Raises:
            DataError: the stream cannot be read.
        """
        self._window = {name: value for name, value in state.items() if name != "taken"}
        self._number, self._passes, self._num_rows_read = state["number"], state["passes"], state["rows_read"]
        self._rewind(state["stream"])
        self._rows, self._taken = [], 0
        if state["taken"]:
            self._read_window()
            self._taken = state["taken"]

    def epochs_after(self, step: int) -> int:
        """None: a stream's passes end on each rank by itself."""
        return 0

    def step(self, number: int) -> Step:
        """This rank's micro-batches of the next step. Collective.

        Raises:
            DataError: on every rank, what any of them met in its rows.
        """
        rows: list[list[np.ndarray]] = []
        error = None
        try:
            rows = [self._next_row() for _ in range(self.global_batch_size // self.share.num_ranks)]
        except DataError as problem:
            error = problem
        self._ranks.agree(error)
        own = [
            sum(int(read_trained(document[1:]).sum()) for row in rows for document in row),
            sum(len(document) - 1 for row in rows for document in row),
            self._passes,
        ]
        num_trained, num_tokens, passes = zip(*self._ranks.gather(own), strict=True)
        micro = deal_rows(rows, Share(0, 1, self.share.rows))
        batches = [build_batch(part, self.seq_len, self.packing) for part in micro]
        return Step(number, batches, sum(num_trained), sum(num_tokens), float(min(passes)))

    def _next_row(self) -> list[np.ndarray]:
        while self._taken == len(self._rows):
            self._window = self._place()
            self._read_window()
            self._taken = 0
        self._taken += 1
        return self._rows[self._taken - 1]

    def _place(self) -> dict[str, Any]:
        return {"number": self._number, "passes": self._passes, "rows_read": self._num_rows_read, "stream": copy.deepcopy(self._stream.state_dict())}

    def _read_window(self) -> None:
        """Read the next documents, and pack them into rows."""
        buffer = io.BytesIO()
        builder = Builder(buffer, self._opened, self.seq_len, self.too_long, self.facts)
        num_read = 0
        for row in self._read_rows():
            num_read += 1
            document = self._encoder.encode(row, self._opened.where(0, self._num_rows_read))
            lines = np.full(len(document.marked), self._num_rows_read)
            builder.add(document.marked, lines, 0, self._num_rows_read, document.remarks)
            if len(builder.documents) >= WINDOW * len(COLUMNS):
                break
        if not num_read:
            raise DataError(f"{self._opened.files[0]}: there is no row; there are more data ranks than rows, or files")
        table = np.frombuffer(builder.documents, dtype=np.int64).reshape(-1, len(COLUMNS))
        check_facts(self.facts, self._opened, self.reading, self.seq_len, len(table))
        marked = np.frombuffer(buffer.getvalue(), dtype=np.int32)
        documents = [marked[start : start + length + 1] for start, length, *_ in table.tolist()]
        random = seeded_random(self.seed, self.share.rank, self._number, 2)
        order = random.permutation(len(documents))
        packed = pack_best_fit(order, table[:, 1], self.seq_len) if self.packing else [[document] for document in order]
        self._rows = [[documents[document] for document in packed[number]] for number in random.permutation(len(packed))]
        self._number += 1

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """Rows to the end of the pass; a new pass begins where the last one has ended."""
        row = self._read_row()
        if row is None:
            self._passes += self._num_rows_read > 0
            self._rewind(self._start_of_pass)
            row = self._read_row()
        while row is not None:
            self._num_rows_read += 1
            yield row
            row = self._read_row()

    def _read_row(self) -> dict[str, Any] | None:
        """The next row, None at the end; raises DataError for whatever the network, the disk or the library has."""
        try:
            return next(self._iterator, None)
        except Exception as error:
            raise DataError(f"{self.found.opened.name}: the stream broke: {type(error).__name__}: {error}") from None

    def _rewind(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(copy.deepcopy(state))
        self._iterator = iter(self._stream)
