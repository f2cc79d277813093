"""An epoch's rows hold every document once, none above seq_len, nearly full, in an order that only seed and epoch decide."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tunelib.data.packing as packing_module
from tunelib.data.mix import seeded_random
from tunelib.data.packing import EpochPlan, pack_best_fit, plan_epoch, plan_in_order

SEQ_LEN = 16
LENGTHS = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=80).map(np.array)
SEEDS = st.integers(0, 2**63 - 1)


def plan(lengths: np.ndarray, seed: int = 0, epoch: int = 0, packing: bool = True, seq_len: int = SEQ_LEN) -> EpochPlan:
    return plan_epoch(np.arange(len(lengths)), lengths, seq_len, packing, seeded_random(seed, epoch))


def rows_of(plan: EpochPlan) -> list[list[int]]:
    return [plan.row(number).tolist() for number in range(len(plan))]


def check_rows(plan: EpochPlan, lengths: np.ndarray, documents: np.ndarray) -> None:
    rows = rows_of(plan)
    assert Counter(document for row in rows for document in row) == Counter(documents.tolist())
    assert all(rows)
    assert all(lengths[row].sum() <= SEQ_LEN for row in rows)


@given(LENGTHS, st.data(), SEEDS, st.booleans(), st.sampled_from([1, 3, 4096]))
@settings(deadline=None)
def test_every_document_of_an_epoch_is_in_a_row_as_often_as_it_was_given(
    lengths: np.ndarray, data: st.DataObject, seed: int, packing: bool, window: int
) -> None:
    documents = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WINDOW", window)
        check_rows(plan_epoch(documents, lengths, SEQ_LEN, packing, seeded_random(seed, 0)), lengths, documents)


@given(LENGTHS, st.booleans(), st.sampled_from([3, 4096]))
@settings(deadline=None)
def test_every_held_out_document_is_in_exactly_one_row(lengths: np.ndarray, packing: bool, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WINDOW", window)
        check_rows(plan_in_order(lengths, SEQ_LEN, packing), lengths, np.arange(len(lengths)))


@given(LENGTHS, SEEDS, st.integers(0, 1000), st.booleans())
@settings(deadline=None)
def test_order_is_a_pure_function_of_seed_and_epoch(lengths: np.ndarray, seed: int, epoch: int, packing: bool) -> None:
    first = plan(lengths, seed, epoch, packing)
    np.random.seed(epoch)  # the global state must not matter
    assert rows_of(first) == rows_of(plan(lengths.copy(), seed, epoch, packing))


@pytest.mark.parametrize("packing", [True, False])
def test_order_differs_between_epochs_and_between_seeds(packing: bool) -> None:
    lengths = 1 + np.arange(200) % SEQ_LEN
    plans = [(0, 0), (0, 1), (0, 2), (1, 0), (2**32, 0), (2**62, 0)]
    orders = {str(rows_of(plan(lengths, seed, epoch, packing))) for seed, epoch in plans}
    assert len(orders) == len(plans)


GOLDEN_ROWS = [[1], [5, 3], [7, 2], [4, 0, 6]]


def test_order_of_today_is_the_order_of_tomorrow() -> None:
    # A checkpoint holds no order, only (seed, epoch): a change here breaks every resumed run.
    assert rows_of(plan(np.array([3, 1, 4, 1, 5, 9, 2, 6]), seed=42, epoch=1, seq_len=10)) == GOLDEN_ROWS


def test_long_documents_are_not_always_first() -> None:
    lengths = 1 + np.arange(160) % SEQ_LEN
    longest = [max(lengths[row]) for row in rows_of(plan(lengths))]
    assert longest != sorted(longest, reverse=True)


def test_each_document_goes_into_the_fullest_row_with_room() -> None:
    lengths = np.array([9, 8, 7, 6, 3, 2, 1])
    rows = pack_best_fit(np.arange(7), lengths, 12)
    assert rows == [[0, 4], [1, 5, 6], [2], [3]]  # the 3 makes the 9 a full row, the 8 it would not


DISTRIBUTIONS = ("uniform", "short", "log-normal", "question and answer", "some cut at 400")


def draw_lengths(distribution: str, count: int, seed: int) -> np.ndarray:
    """Lengths from 20 to 400 tokens, as of chat sets."""
    chance = np.random.RandomState(seed)
    if distribution == "uniform":
        return chance.randint(20, 401, size=count)
    if distribution == "question and answer":  # a short question in a template, and an answer of any length
        lengths = 14 + chance.geometric(1 / 25, size=count) + np.exp(chance.normal(np.log(120), 0.9, size=count))
    else:
        median, deviation = {"short": (60, 0.6), "log-normal": (150, 0.7), "some cut at 400": (150, 0.9)}[distribution]
        lengths = np.exp(chance.normal(np.log(median), deviation, size=count))
    return np.clip(lengths, 20, 400).astype(np.int64)


@pytest.mark.parametrize(("seq_len", "least"), [(512, 0.97), (2048, 0.99)])
@pytest.mark.parametrize("count", [5000, 9000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rows_of_a_chat_set_are_nearly_full(distribution: str, count: int, seq_len: int, least: float) -> None:
    for seed in range(3):
        lengths = draw_lengths(distribution, count, seed)
        assert lengths.sum() / (len(plan(lengths, seed, seq_len=seq_len)) * seq_len) >= least
        held_out = plan_in_order(lengths, seq_len, packing=True)
        assert lengths.sum() / (len(held_out) * seq_len) >= least


def test_million_documents_are_planned_in_seconds() -> None:
    lengths = draw_lengths("log-normal", 1_000_000, 0)
    begun = time.process_time()
    made = plan(lengths, seq_len=2048)
    assert time.process_time() - begun < 15  # one second on an idle core
    assert np.array_equal(np.sort(made.documents), np.arange(len(lengths)))
    totals = np.add.reduceat(lengths[made.documents], made.bounds[:-1])
    assert totals.max() <= 2048
    assert totals.mean() / 2048 >= 0.99


def test_documents_of_one_row_are_of_one_window_or_of_two_neighbours_and_rows_are_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "WINDOW", 10)
    order = seeded_random(7, 0).permutation(100)
    window_of = {document: place // 10 for place, document in enumerate(order.tolist())}
    rows = rows_of(plan(np.full(100, 4), seed=7))
    assert len(rows) == 25  # windows of ten leave two over, which four of the next complete
    windows = [sorted(window_of[document] for document in row) for row in rows]
    assert all(row[-1] - row[0] <= 1 for row in windows)
    assert windows != sorted(windows)


def test_windows_cost_no_fill_where_a_row_holds_many_documents() -> None:
    lengths = draw_lengths("log-normal", 30_000, 0)
    assert len(plan(lengths, seq_len=32_768)) <= lengths.sum() // 32_768 + 2


def test_without_packing_each_document_has_its_own_row() -> None:
    assert all(len(row) == 1 for row in rows_of(plan(np.ones(9, dtype=int), packing=False)))
    assert rows_of(plan_in_order(np.ones(4, dtype=int), SEQ_LEN, False)) == [[0], [1], [2], [3]]
