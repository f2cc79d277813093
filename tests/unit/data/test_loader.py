"""The rows of a step do not depend on how many ranks there are or how large a micro-batch is; labels are shifted once."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.samples import make_index

from tunelib.batch import IGNORED, Batch
from tunelib.data.index import Index
from tunelib.data.loader import HeldOutData, Share, Step, TrainData, build_batch
from tunelib.errors import DataError

SEQ_LEN, GLOBAL = 12, 8
ALONE = Share(rank=0, num_ranks=1, rows=GLOBAL)


def mixed_index(num_documents: int = 60) -> Index:
    """Documents of 1 to 11 positions, of which every third label is trained and, in every fourth document, only the last."""
    lengths = [1 + (7 * number) % 11 for number in range(num_documents)]
    return make_index(
        lengths, [[(number % 4 != 0 and place % 3 == 0) or place == length - 1 for place in range(length)] for number, length in enumerate(lengths)]
    )


def train_data(
    index: Index, share: Share = ALONE, packing: bool = True, seed: int = 5, global_batch_size: int = GLOBAL, last_batch: str = "fill"
) -> TrainData:
    return TrainData(index, SEQ_LEN, packing, seed, global_batch_size, share, last_batch)


def build_rows(index: Index, rows: list[list[int]], packing: bool) -> Batch:
    return build_batch([index.read_row(np.array(row, dtype=np.int64)) for row in rows], SEQ_LEN, packing)


def rows_in(batches: list[Batch]) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, positions) of each row, without padding on its right, so that unpacked rows of other widths compare."""
    rows = []
    for batch in batches:
        for tokens, labels, positions in zip(batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), strict=True):
            width = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=0)
            rows.append((tokens[:width], labels[:width], positions[:width]))
    return rows


def place_labels(batch: Batch) -> list[tuple[int, int]]:
    """(token, label) of every trained position."""
    trained = batch.labels != IGNORED
    return list(zip(batch.tokens[trained].tolist(), batch.labels[trained].tolist(), strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("num_ranks", "rows"), [(1, 1), (1, 2), (1, 3), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_rows_of_a_step_are_the_same_on_every_layout(packing: bool, num_ranks: int, rows: int) -> None:
    index = mixed_index()
    alone = train_data(index, packing=packing)
    ranks = [train_data(index, Share(rank, num_ranks, rows), packing) for rank in range(num_ranks)]
    for number in (1, 2, 7):
        reference = alone.step(number)
        steps = [data.step(number) for data in ranks]
        assert [row for step in steps for row in rows_in(step.batches)] == rows_in(reference.batches)
        assert {(step.num_trained, step.num_tokens, step.epoch) for step in steps} == {(reference.num_trained, reference.num_tokens, reference.epoch)}
        assert all(len(batch.tokens) <= rows for step in steps for batch in step.batches)
        assert len({len(step.batches) for step in steps}) == 1  # every rank reaches as many collectives


def test_trained_tokens_known_beforehand_are_those_in_the_batches() -> None:
    index = mixed_index()
    ranks = [train_data(index, Share(rank, 4, 1)) for rank in range(4)]
    for number in range(1, 12):
        steps = [data.step(number) for data in ranks]
        assert steps[0].num_trained == sum(len(place_labels(batch)) for step in steps for batch in step.batches)


@given(
    st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=40),
    st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 4), (4, 1), (4, 2)]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["fill", "drop"]),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_step_is_a_function_of_its_number_alone(
    lengths: list[int], layout: tuple[int, int], per_rank: int, packing: bool, last_batch: str, seed: int, steps: list[int]
) -> None:
    (num_ranks, rows), index = layout, make_index(lengths)
    size = 4 * per_rank  # what 1, 2 and 4 ranks can share
    if last_batch == "drop" and len(lengths) < size * SEQ_LEN:
        lengths = lengths * size * SEQ_LEN  # rows enough for a batch
        index = make_index(lengths)
    alone = train_data(index, Share(0, 1, size), packing, seed, size, last_batch)
    for step in range(1, max(steps)):
        alone.step(step)  # an uninterrupted run has seen all before; a resumed one begins anywhere
    ranks = [train_data(index, Share(rank, num_ranks, rows), packing, seed, size, last_batch) for rank in range(num_ranks)]
    for step in steps:
        reference, found = alone.step(step), [rank.step(step) for rank in ranks]
        assert [row for of_rank in found for row in rows_in(of_rank.batches)] == rows_in(reference.batches)
        assert {(of_rank.num_trained, of_rank.num_tokens, of_rank.epoch) for of_rank in found} == {
            (reference.num_trained, reference.num_tokens, reference.epoch)
        }


def test_dropping_leaves_out_the_last_rows_of_each_epoch_and_says_so() -> None:
    index = make_index([SEQ_LEN] * 19)
    data = train_data(index, last_batch="drop")
    assert [data.steps_in_epochs(epochs) for epochs in (1, 2, 3)] == [2, 4, 6]
    seen = []
    for epoch in range(3):
        rows = [row for step in (2 * epoch + 1, 2 * epoch + 2) for row in data.rows_of(step)]
        assert {of for of, _ in rows} == {epoch}
        documents = [int(document) for _, row in rows for document in row]
        assert len(set(documents)) == len(documents) == 16
        seen.append(frozenset(documents))
    assert len(set(seen)) == 3  # other documents are left out in each
    assert data.step(2).epoch == 1.0
    assert "19 rows an epoch, 100.00% full; the last 3 are left out" in data.notes


def test_dropping_all_of_an_epoch_is_an_error() -> None:
    data = train_data(make_index([SEQ_LEN] * 7), last_batch="drop")
    with pytest.raises(DataError, match=r"an epoch has 7 rows, less than training\.global_batch_size = 8, and dataset\.last_batch"):
        data.step(1)


def test_small_epochs_are_each_whole_where_a_batch_spans_several() -> None:
    data = train_data(make_index([SEQ_LEN] * 3), global_batch_size=40)
    rows = [(epoch, int(row[0])) for step in (3, 1, 2) for epoch, row in data.rows_of(step)]
    counts = Counter(rows)
    assert set(counts.values()) == {1}
    assert {epoch for epoch, _ in rows} == set(range(40))


def test_step_far_ahead_costs_no_more_memory_than_the_next_one() -> None:
    data = train_data(make_index([SEQ_LEN] * 8))
    data.step(500)
    assert len(data._plans) <= 2


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_whole_and_its_end_is_known(lengths: list[int], global_batch_size: int, epochs: int, packing: bool) -> None:
    data = TrainData(make_index(lengths), SEQ_LEN, packing, 0, global_batch_size, Share(0, 1, global_batch_size))
    num_steps = data.steps_in_epochs(epochs)
    assert data.epochs_after(num_steps) >= epochs
    assert data.epochs_after(num_steps - 1) < epochs
    rows = [row for number in range(1, num_steps + 1) for row in data.rows_of(number)]
    seen = [Counter(int(document) for of_epoch, row in rows if of_epoch == epoch for document in row) for epoch in range(epochs)]
    assert seen == [Counter(range(len(lengths)))] * epochs
    assert [epoch for epoch, _ in rows] == sorted(epoch for epoch, _ in rows)
    for step in range(num_steps + 1):  # a whole epoch is one of which all rows have passed
        passed = Counter(epoch for epoch, _ in rows[: step * global_batch_size])
        whole = sum(passed[epoch] == sum(of == epoch for of, _ in rows) for epoch in range(epochs))
        assert data.epochs_after(step) >= whole
        assert data.epochs_after(step) <= max(passed, default=-1) + 1


def test_last_batch_of_an_epoch_is_filled_from_the_next() -> None:
    data = train_data(make_index([SEQ_LEN] * 10))
    assert [epoch for epoch, _ in data.rows_of(2)] == [0] * 2 + [1] * 6
    assert [data.epochs_after(step) for step in range(6)] == [0, 0, 1, 2, 3, 4]
    assert [data.steps_in_epochs(epochs) for epochs in (1, 2, 3, 4)] == [2, 3, 4, 5]
    assert [data.step(step).epoch for step in (1, 2, 5)] == pytest.approx([0.8, 1.6, 4.0])


def test_batch_larger_than_the_data_takes_several_epochs() -> None:
    data = train_data(make_index([SEQ_LEN] * 3))
    assert [epoch for epoch, _ in data.rows_of(1)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (data.epochs_after(1), data.steps_in_epochs(1), data.steps_in_epochs(3)) == (2, 1, 2)


def test_step_does_not_depend_on_which_steps_were_asked_for_before() -> None:
    index = mixed_index(20)
    in_order = train_data(index)
    expected = [rows_in(in_order.step(number).batches) for number in range(1, 12)]
    backwards = train_data(index)
    assert [rows_in(backwards.step(number).batches) for number in range(11, 0, -1)] == expected[::-1]
    fresh = [rows_in(train_data(index).step(number).batches) for number in range(1, 12)]
    assert fresh == expected


def test_seed_changes_the_order_and_nothing_else() -> None:
    index = mixed_index()

    def pairs(seed: int) -> list[list[tuple[int, int]]]:
        data = train_data(index, seed=seed)
        return [place_labels(batch) for number in range(1, data.steps_in_epochs(1)) for batch in data.step(number).batches]

    assert pairs(1) == pairs(1) != pairs(2)


@pytest.mark.parametrize("packing", [True, False])
def test_labels_are_the_next_tokens_of_the_same_document(packing: bool) -> None:
    index = mixed_index()
    data = train_data(index, packing=packing)
    for batch in data.step(1).batches:
        pairs = place_labels(batch)
        assert pairs
        assert all(label == token + 1 for token, label in pairs)


@pytest.mark.parametrize("packing", [True, False])
def test_document_lengths_cut_rows_into_documents_and_padding(packing: bool) -> None:
    index = mixed_index()
    for batch in train_data(index, Share(0, 1, 4), packing).step(1).batches:
        assert sum(batch.document_lengths) == batch.tokens.numel()
        ends = set(np.cumsum(batch.document_lengths).tolist())
        assert {batch.tokens.shape[1] * row for row in range(1, len(batch.tokens) + 1)} <= ends  # no document reaches into the next row
        expected = torch.cat([torch.arange(length) for length in batch.document_lengths])
        assert torch.equal(batch.positions.flatten(), expected)


def test_packed_rows_are_seq_len_wide_and_single_documents_as_wide_as_the_longest() -> None:
    index = make_index([3, 5, 2])
    assert build_rows(index, [[0], [1]], packing=True).tokens.shape == (2, SEQ_LEN)
    assert build_rows(index, [[0], [1]], packing=False).tokens.shape == (2, 5)


def test_padding_is_its_own_document_and_never_trained() -> None:
    batch = build_rows(make_index([3]), [[0]], packing=True)
    assert batch.document_lengths == (3, SEQ_LEN - 3)
    assert (batch.labels[0, 3:] == IGNORED).all()
    assert batch.positions[0].tolist() == [0, 1, 2, *range(SEQ_LEN - 3)]


def test_full_row_has_no_padding() -> None:
    batch = build_rows(make_index([SEQ_LEN - 4, 4]), [[0, 1]], packing=True)
    assert batch.document_lengths == (SEQ_LEN - 4, 4)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("num_ranks", "rows"), [(1, 8), (1, 3), (2, 2), (4, 1), (4, 5)])
def test_held_out_documents_are_all_seen_once_on_every_layout(packing: bool, num_ranks: int, rows: int) -> None:
    index = mixed_index(17)
    batches = [list(HeldOutData(index, SEQ_LEN, packing, Share(rank, num_ranks, rows)).batches()) for rank in range(num_ranks)]
    assert len({len(of_rank) for of_rank in batches}) == 1
    pairs = sorted(pair for of_rank in batches for batch in of_rank for pair in place_labels(batch))
    whole = build_rows(index, [[number] for number in range(17)], packing=False)
    assert pairs == sorted(place_labels(whole))
    num_trained = sum(int((batch.labels != IGNORED).sum()) for of_rank in batches for batch in of_rank)
    assert HeldOutData(index, SEQ_LEN, packing, ALONE).num_trained == num_trained == int(index.num_trained.sum())


def test_order_of_the_data_is_part_of_its_fingerprint() -> None:
    index = mixed_index()
    usual = train_data(index).fingerprint
    others = [train_data(index, seed=6), train_data(index, packing=False), train_data(index, global_batch_size=4), train_data(mixed_index(59))]
    others.append(train_data(index, last_batch="drop"))
    assert all(other.fingerprint != usual for other in others)
    assert train_data(index, Share(1, 4, 1)).fingerprint == usual
    assert usual.items() >= index.fingerprint.items()


def test_rows_of_the_next_step_are_made_while_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another thread, once, and by nobody where a step is asked for that does not follow."""
    data, made = train_data(mixed_index()), []
    make = data._make

    def watched(number: int) -> Step:
        made.append((number, threading.current_thread() is threading.main_thread()))
        return make(number)

    monkeypatch.setattr(data, "_make", watched)
    steps = {1: data.step(1)}
    assert data._ahead is not None
    data._ahead[1].result(timeout=10)
    assert made == [(1, True), (2, False)]
    steps |= {number: data.step(number) for number in (2, 3, 7)}
    data._ahead[1].result(timeout=10)
    assert sorted(made) == [(1, True), (2, False), (3, False), (4, False), (7, True), (8, False)]
    data.last_step = 8
    steps[8] = data.step(8)
    assert data._ahead is None, "beyond the last step"
    for number, step in steps.items():
        assert rows_in(step.batches) == rows_in(train_data(mixed_index()).step(number).batches)


def test_fault_of_rows_made_ahead_is_that_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    data = train_data(mixed_index())
    make = data._make

    def faulty(number: int) -> Step:
        if number == 2:
            raise DataError("the index is cut short")
        return make(number)

    monkeypatch.setattr(data, "_make", faulty)
    assert data.step(1).number == 1
    with pytest.raises(DataError, match="cut short"):
        data.step(2)
