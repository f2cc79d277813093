"""A stream's rows: every document once in a pass, exact after a resume, shared out over the data ranks."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from unit.samples import DEBUG_TOKENIZER

from tunelib.config.schema import Columns
from tunelib.data import stream
from tunelib.data.encode import Reading
from tunelib.data.index import FoundSource
from tunelib.data.loader import Share, Step
from tunelib.data.prepare import ALONE, raise_error
from tunelib.data.sources import OpenedSource
from tunelib.data.stream import Ranks, StreamData
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

ROWS = [{"text": f"document {number} " + "word " * (number % 7)} for number in range(200)]
TOKENIZER = Tokenizer(DEBUG_TOKENIZER)
SEQ_LEN = 64


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW", 32)


def open_data(
    rank: int = 0, num_ranks: int = 1, rows: list[dict[str, Any]] = ROWS, packing: bool = True, seed: int = 0, too_long: str = "split"
) -> StreamData:
    dataset = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=min(4, len(rows)))
    found = FoundSource(OpenedSource("o/n", ("o/n[train]",), "digest", 0, (), dataset), "text", "", Columns())
    reading = Reading(TOKENIZER, None, "text", Columns(), "assistant", False, TOKENIZER.vocab_size)
    share = Share(rank, num_ranks, 2)
    return StreamData(found, reading, {}, SEQ_LEN, too_long, packing, seed, 4 * num_ranks, share, ALONE)


def documents_of(step: Step) -> list[str]:
    """The texts of a step's documents."""
    found = []
    for batch in step.batches:
        tokens, place = batch.tokens.flatten().tolist(), 0
        for length in batch.document_lengths:
            if any(tokens[place : place + length]):
                found.append(TOKENIZER.decode(tokens[place : place + length]))
            place += length
    return found


def take_a_pass(data: StreamData) -> list[str]:
    """The documents of the first pass; the first step that has any of the second ends it."""
    found: list[str] = []
    number = 1
    while True:
        step = data.step(number)
        if step.epoch >= 1:
            return found
        found += documents_of(step)
        number += 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_together_see_each_document_once_in_a_pass(num_ranks: int) -> None:
    seen = Counter(text for rank in range(num_ranks) for text in take_a_pass(open_data(rank, num_ranks)))
    assert set(seen.values()) == {1}
    assert len(seen) > 0.8 * len(ROWS), "only the rows of the step that reaches into the second pass are missing"
    assert set(seen) <= {row["text"].rstrip() if row["text"].rstrip() in seen else row["text"] for row in ROWS}


@pytest.mark.parametrize("stop", range(1, 30, 4))
def test_resumed_stream_gives_the_same_steps(stop: int) -> None:
    data, number = open_data(1, 2), 0
    while (number := number + 1) <= stop:
        data.step(number)
    state = json.loads(json.dumps(data.state()))
    resumed = open_data(1, 2)
    resumed.restore(state)
    for later in range(stop + 1, stop + 12):
        one, other = data.step(later), resumed.step(later)
        assert documents_of(one) == documents_of(other)
        assert (one.num_trained, one.num_tokens, one.epoch) == (other.num_trained, other.num_tokens, other.epoch)


def test_order_follows_from_the_seed() -> None:
    first, same, other = (documents_of(open_data(seed=seed).step(1)) for seed in (0, 0, 1))
    assert first == same != other


def test_unpacked_rows_hold_one_document() -> None:
    step = open_data(packing=False).step(1)
    assert len(documents_of(step)) == 4
    assert step.num_tokens == sum(len(TOKENIZER.encode_document(text).ids) - 1 for text in documents_of(step))


def test_counts_are_summed_over_the_ranks_and_the_slowest_counts_the_passes() -> None:
    data, plain = open_data(), open_data().step(1)
    data._ranks = Ranks(raise_error, lambda own: [own, [2 * own[0], 3 * own[1], own[2] + 5]])
    step = data.step(1)
    assert (step.num_trained, step.num_tokens, step.epoch) == (3 * plain.num_trained, 4 * plain.num_tokens, 0.0)


def test_error_of_another_rank_is_raised_here() -> None:
    def agree(error: BaseException | None) -> None:
        raise DataError("rank 1: its row is wrong")

    data = open_data()
    data._ranks = Ranks(agree, list)
    with pytest.raises(DataError, match="rank 1: its row is wrong"):
        data.step(1)


def test_broken_network_is_said_in_every_pass() -> None:
    data = open_data()
    data._iterator = iter_then_fail(data._iterator, 3)
    with pytest.raises(DataError, match=r"o/n: the stream broke: ConnectionError: down"):
        data.step(1)


def iter_then_fail(rows: Iterator[Any], count: int) -> Iterator[Any]:
    yield from itertools.islice(rows, count)
    raise ConnectionError("down")


def test_what_was_left_out_is_told() -> None:
    data = open_data(rows=[{"text": "a <|im_end|> b " * (30 if number % 4 == 0 else 1)} for number in range(40)], too_long="drop")
    data.step(1)
    report = "\n".join(data.report)
    assert re.search(r"o/n: \d+ documents read by rank 0, in 1 passes", report)
    assert re.search(r"\d+ documents left out: longer than 64 tokens \(first o/n\[train\], row 1\)", report)
    assert "documents spell out special tokens" in report


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"txt": "a"}] * 5, r"o/n\[train\] of rank 0, row 1: no column 'text'"),
        ([{"text": ""}] * 5, r"o/n: no token of 5 documents is trained"),
    ],
)
def test_what_is_wrong_with_rows_is_said(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(rows=rows).step(1)


def test_rank_without_rows_says_so() -> None:
    with pytest.raises(DataError, match=r"of rank 3: there is no row; there are more data ranks than rows"):
        open_data(3, 4, rows=ROWS[:2]).step(1)


def test_long_documents_are_cut_as_asked() -> None:
    rows = [{"text": "word " * 100}] * 4
    whole = len(TOKENIZER.encode_document(rows[0]["text"]).ids) - 1
    assert open_data(rows=rows, too_long="split", packing=False).step(1).num_tokens > 0
    assert open_data(rows=rows, too_long="truncate", packing=False).step(1).num_tokens == 4 * SEQ_LEN < 4 * whole
    with pytest.raises(DataError, match=r"o/n\[train\] of rank 0, row 1: \d+ tokens do not fit training.seq_len = 64"):
        open_data(rows=rows, too_long="error").step(1)
    with pytest.raises(DataError, match=r"o/n: all 4 documents are longer than training.seq_len = 64"):
        open_data(rows=rows, too_long="drop").step(1)
