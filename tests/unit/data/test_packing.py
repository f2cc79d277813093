"""An epoch's rows hold every document once, none above seq_len, in an order that only seed and epoch decide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tunelib.data.packing as packing_module
from tunelib.data.packing import EpochPlan, plan_epoch, plan_in_order

SEQ_LEN = 16
LENGTHS = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=80).map(np.array)
SEEDS = st.integers(0, 2**63 - 1)


def rows_of(plan: EpochPlan) -> list[list[int]]:
    return [plan.row(number).tolist() for number in range(len(plan))]


def check_rows(plan: EpochPlan, lengths: np.ndarray) -> None:
    rows = rows_of(plan)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(lengths[row].sum() <= SEQ_LEN for row in rows)


@given(LENGTHS, SEEDS, st.integers(0, 1000), st.booleans(), st.sampled_from([1, 3, 4096]))
@settings(deadline=None)
def test_every_document_is_in_exactly_one_row_per_epoch(lengths: np.ndarray, seed: int, epoch: int, packing: bool, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "WINDOW", window)
        check_rows(plan_epoch(lengths, SEQ_LEN, packing, seed, epoch), lengths)


@given(LENGTHS, st.booleans())
@settings(deadline=None)
def test_every_held_out_document_is_in_exactly_one_row(lengths: np.ndarray, packing: bool) -> None:
    check_rows(plan_in_order(lengths, SEQ_LEN, packing), lengths)


@given(LENGTHS, SEEDS, st.integers(0, 1000), st.booleans())
@settings(deadline=None)
def test_order_is_a_pure_function_of_seed_and_epoch(lengths: np.ndarray, seed: int, epoch: int, packing: bool) -> None:
    first = plan_epoch(lengths, SEQ_LEN, packing, seed, epoch)
    np.random.seed(epoch)  # the global state must not matter
    assert rows_of(first) == rows_of(plan_epoch(lengths.copy(), SEQ_LEN, packing, seed, epoch))


@pytest.mark.parametrize("packing", [True, False])
def test_order_differs_between_epochs_and_between_seeds(packing: bool) -> None:
    lengths = 1 + np.arange(200) % SEQ_LEN
    plans = [(0, 0), (0, 1), (0, 2), (1, 0), (2**32, 0), (2**62, 0)]
    orders = {str(rows_of(plan_epoch(lengths, SEQ_LEN, packing, seed, epoch))) for seed, epoch in plans}
    assert len(orders) == len(plans)


GOLDEN_ROWS = [[1], [5, 3], [7, 2], [4, 0, 6]]


def test_order_of_today_is_the_order_of_tomorrow() -> None:
    # A checkpoint holds no order, only (seed, epoch): a change here breaks every resumed run.
    assert rows_of(plan_epoch(np.array([3, 1, 4, 1, 5, 9, 2, 6]), 10, True, seed=42, epoch=1)) == GOLDEN_ROWS


def test_long_documents_are_not_always_first() -> None:
    lengths = 1 + np.arange(160) % SEQ_LEN
    rows = rows_of(plan_epoch(lengths, SEQ_LEN, True, seed=0, epoch=0))
    longest = [max(lengths[row]) for row in rows]
    assert longest != sorted(longest, reverse=True)


def test_packing_wastes_little() -> None:
    lengths = np.random.RandomState(0).randint(1, SEQ_LEN + 1, size=2000)
    plan = plan_epoch(lengths, SEQ_LEN, True, seed=0, epoch=0)
    assert lengths.sum() > 0.98 * SEQ_LEN * len(plan)


def test_document_moves_no_further_than_its_window_before_rows_are_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "WINDOW", 10)
    lengths = np.full(100, 4)
    order = np.random.RandomState([7, 0, 0]).permutation(100)
    window_of = {document: place // 10 for place, document in enumerate(order.tolist())}
    for row in rows_of(plan_epoch(lengths, SEQ_LEN, True, seed=7, epoch=0)):
        assert len({window_of[document] for document in row}) == 1


def test_without_packing_each_document_has_its_own_row() -> None:
    assert all(len(row) == 1 for row in rows_of(plan_epoch(np.ones(9, dtype=int), SEQ_LEN, False, 0, 0)))
    assert rows_of(plan_in_order(np.ones(4, dtype=int), SEQ_LEN, False)) == [[0], [1], [2], [3]]
