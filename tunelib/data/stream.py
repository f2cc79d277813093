"""Training rows read from a Hub data set while training, for data that is too large to fetch first.

Each data rank reads its own share of the stream, a window of documents at a time: encoded, cut, packed by best fit, rows shuffled.
What this gives up: the order depends on the number of data ranks, documents move only within their window, a document's length is
not known before it is read, and there is no epoch whose end could be told beforehand. A stream that ends begins again.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunelib.data.encode import Encoder, read_trained
from tunelib.data.index import FoundSource
from tunelib.data.loader import Share, Step, build_batch, deal_rows
from tunelib.data.mix import seeded_random
from tunelib.data.packing import pack_best_fit
from tunelib.errors import DataError

if TYPE_CHECKING:
    import datasets

WINDOW = 1024
SumOverRanks = Callable[[Sequence[int]], list[int]]


class StreamData:
    """The training rows of every step, read when they are needed; steps can only be taken in order.

    Args:
        found: the stream, and the format of its rows.
        encoder: makes documents of rows.
        fingerprint: name → value of what decides the documents.
        seq_len: positions per row.
        too_long: "truncate", "split", "drop" or "error".
        packing: several documents per row.
        seed: of the order inside a window.
        global_batch_size: rows per step, over all ranks.
        share: this rank's part.
        sum_over_ranks: sums counts over the data ranks; collective.
    """

    def __init__(
        self,
        found: FoundSource,
        encoder: Encoder,
        fingerprint: dict[str, Any],
        seq_len: int,
        too_long: str,
        packing: bool,
        seed: int,
        global_batch_size: int,
        share: Share,
        sum_over_ranks: SumOverRanks,
    ):
        from datasets.distributed import split_dataset_by_node

        assert found.opened.dataset is not None, "a stream is a Hub data set"
        self.found, self.encoder, self.seq_len, self.too_long, self.packing, self.seed = found, encoder, seq_len, too_long, packing, seed
        self.global_batch_size, self.share, self._sum_over_ranks = global_batch_size, share, sum_over_ranks
        self._stream: datasets.IterableDataset = split_dataset_by_node(found.opened.dataset, share.rank, share.num_ranks)
        order = {"dataset.packing": packing, "training.seed": seed, "training.global_batch_size": global_batch_size}
        self.fingerprint = {**fingerprint, **order, "dataset.streaming": "each of the data ranks reads a share", "data ranks": share.num_ranks}
        self._window: dict[str, Any] = {"number": 0, "passes": 0, "examples": 0, "stream": copy.deepcopy(self._stream.state_dict())}
        self._start_of_pass = self._window["stream"]
        self._passes, self._examples, self._number = 0, 0, 0
        self._iterator: Iterator[dict[str, Any]] = iter(self._stream)
        self._rows: list[list[np.ndarray]] = []
        self._taken = 0

    @property
    def notes(self) -> list[str]:
        """What a person should know."""
        name, ranks = self.found.opened.name, self.share.num_ranks
        return [f"{name}: streamed: its order depends on the number of data ranks, {ranks} now, and the run can only be resumed on as many"]

    def state(self) -> dict[str, Any]:
        """Where this rank's stream stands, as JSON: the beginning of its window, and how many of the window's rows were taken."""
        return {**self._window, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; the window is read again."""
        self._window = {name: value for name, value in state.items() if name != "taken"}
        self._number, self._passes, self._examples = state["number"], state["passes"], state["examples"]
        self._rewind(state["stream"])
        self._rows, self._taken = [], 0
        if state["taken"]:
            self._read_window()
            self._taken = state["taken"]

    def epochs_after(self, step: int) -> int:
        """None: a stream's epochs end on each rank by itself."""
        return 0

    def step(self, number: int) -> Step:
        """This rank's micro-batches of the next step. Collective."""
        rows = [self._next_row() for _ in range(self.global_batch_size // self.share.num_ranks)]
        own = [sum(int(read_trained(document[1:]).sum()) for row in rows for document in row)]
        own.append(sum(len(document) - 1 for row in rows for document in row))
        num_trained, num_tokens = self._sum_over_ranks(own)
        micro = deal_rows(rows, Share(0, 1, self.share.rows))
        batches = [build_batch(part, self.seq_len, self.packing) for part in micro]
        return Step(number, batches, num_trained, num_tokens, float(self._passes))

    def _next_row(self) -> list[np.ndarray]:
        while self._taken == len(self._rows):
            self._window = {
                "number": self._number,
                "passes": self._passes,
                "examples": self._examples,
                "stream": copy.deepcopy(self._stream.state_dict()),
            }
            self._read_window()
            self._taken = 0
        self._taken += 1
        return self._rows[self._taken - 1]

    def _read_window(self) -> None:
        """Read the next documents, and pack them into rows."""
        documents: list[np.ndarray] = []
        num_read = 0
        for row in self._read_rows():
            num_read += 1
            where = f"{self.found.opened.name}, row {self._examples} of rank {self.share.rank}"
            documents += cut_document(self.encoder.encode(row, where).marked, self.seq_len, self.too_long, where)
            if len(documents) >= WINDOW:
                break
        if not documents:
            why = "no token in them is trained, or they are too long" if num_read else "there are more data ranks than rows"
            raise DataError(f"{self.found.opened.name}: nothing to train on in the {num_read} rows of rank {self.share.rank}: {why}")
        random = seeded_random(self.seed, self.share.rank, self._number, 2)
        lengths = np.array([len(document) - 1 for document in documents])
        order = random.permutation(len(documents))
        packed = pack_best_fit(order, lengths, self.seq_len) if self.packing else [[document] for document in order]
        self._rows = [[documents[document] for document in packed[number]] for number in random.permutation(len(packed))]
        self._number += 1

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """Rows to the end of the pass; a new pass begins where the last one has ended."""
        first = True
        while True:
            try:
                row = next(self._iterator)
            except StopIteration:
                if not first:
                    return
                self._passes += self._examples > 0
                self._rewind(self._start_of_pass)
                again = next(self._iterator, None)
                if again is None:
                    return
                row = again
            except Exception as error:  # of the network, the disk or a parser, as the library raised it
                raise DataError(f"{self.found.opened.name}: the stream broke: {type(error).__name__}: {error}") from None
            first = False
            self._examples += 1
            yield row

    def _rewind(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(copy.deepcopy(state))
        self._iterator = iter(self._stream)


def cut_document(marked: np.ndarray, seq_len: int, too_long: str, where: str) -> list[np.ndarray]:
    """A document as those pieces of at most ``seq_len`` positions in which a label is trained; raises DataError where asked to."""
    length = len(marked) - 1
    if length > seq_len:
        if too_long == "error":
            raise DataError(f"{where}: {length + 1} tokens do not fit training.seq_len = {seq_len}; see dataset.too_long")
        if too_long == "drop":
            return []
        if too_long == "truncate":
            length = seq_len
    pieces = [marked[first : first + min(seq_len, length - first) + 1] for first in range(0, length, seq_len)]
    return [piece for piece in pieces if read_trained(piece[1:]).any()]
