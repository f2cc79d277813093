"""Sources give what their weights or repeats ask for, each document as often as the others of its source."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.samples import make_index

from tunelib.data.encode import read_ids
from tunelib.data.index import Index
from tunelib.data.loader import Share, TrainData
from tunelib.data.mix import build_mix, describe_mix, seeded_random
from tunelib.errors import DataError

SEQ_LEN = 12


def make_mix(lengths: list[list[int]], weights: list[float] | None = None, repeats: list[float | None] | None = None) -> Index:
    """One index of several sources; document d of source s has the tokens 1000·d, … of its own array."""
    parts = [make_index(of_source) for of_source in lengths]
    sources = []
    for number, part in enumerate(parts):
        found = replace(
            part.sources[0].found,
            opened=replace(part.sources[0].found.opened, name=f"source {number}"),
            weight=weights[number] if weights else None,
            repeats=repeats[number] if repeats else None,
        )
        sources.append(replace(part.sources[0], found=found))
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("starts", "lengths", "num_trained", "files", "lines", "digests")
    }
    return Index(tuple(sources), np.repeat(np.arange(len(parts), dtype=np.int16), list(map(len, lengths))), **columns)


def counts_of(index: Index, seed: int, epochs: int) -> list[Counter[int]]:
    mix = build_mix(index)
    return [Counter(mix.documents(seed, epoch).tolist()) for epoch in range(epochs)]


def test_sources_without_a_wish_are_taken_once_each() -> None:
    index = make_mix([[1, 2, 3], [4] * 5])
    assert counts_of(index, 0, 3) == [Counter(range(8))] * 3
    alone = make_index([1, 2])
    assert describe_mix(alone, build_mix(alone)) == []


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_repeats_of_one_half_takes_each_document_once_in_two_epochs(num_documents: int, other: int, seed: int) -> None:
    index = make_mix([[3] * num_documents, [2] * other], repeats=[0.5, 1.0])
    epochs = counts_of(index, seed, 4)
    if num_documents > 1:
        assert all(epoch[document] == 1 for epoch in epochs for document in range(num_documents, num_documents + other))
        for first in (0, 2):
            both = epochs[first] + epochs[first + 1]
            assert {both[document] for document in range(num_documents)} == {1}


@given(st.integers(1, 30), st.sampled_from([2.0, 3.0]), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_whole_repeats_take_each_document_so_often_in_every_epoch(num_documents: int, repeats: float, seed: int) -> None:
    index = make_mix([[3] * num_documents, [2]], repeats=[repeats, None])
    for epoch in counts_of(index, seed, 3):
        assert [epoch[document] for document in range(num_documents + 1)] == [repeats] * num_documents + [1]


@given(st.integers(1, 30), st.floats(0.1, 4), st.integers(0, 100), st.integers(1, 8))
@settings(deadline=None, max_examples=100)
def test_no_document_is_a_time_ahead_of_another_of_its_source(num_documents: int, repeats: float, seed: int, epochs: int) -> None:
    repeats = max(repeats, 1 / num_documents)
    index = make_mix([[3] * num_documents], repeats=[repeats])
    total = sum(counts_of(index, seed, epochs), Counter())
    times = [total[document] for document in range(num_documents)]
    assert max(times) - min(times) <= 1
    assert abs(sum(times) - repeats * num_documents * epochs) <= 0.5 + 1e-6


def test_halves_differ_between_seeds_and_between_passes() -> None:
    index = make_mix([[3] * 40, [2]], repeats=[0.5, 1.0])
    halves = [frozenset(counts_of(index, seed, epoch + 1)[epoch]) for seed, epoch in ((0, 0), (1, 0), (0, 2), (0, 4))]
    assert len(set(halves)) == 4


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [9, 1]])
def test_weights_are_shares_of_the_tokens_within_a_hundredth(weights: list[float]) -> None:
    chance = np.random.RandomState(0)
    lengths = [chance.randint(20, 400, size=3000).tolist(), chance.randint(5, 60, size=9000).tolist()]
    index = make_mix(lengths, weights=weights)
    mix = build_mix(index)
    for epoch in range(2):
        documents = mix.documents(0, epoch)
        own = [index.lengths[documents[index.source[documents] == number]].sum() for number in range(2)]
        assert own[0] / sum(own) == pytest.approx(weights[0] / sum(weights), abs=0.01)
        assert sum(own) == pytest.approx(index.lengths.sum(), rel=0.01)  # an epoch is as long as all documents together
    notes = describe_mix(index, mix)
    assert f"source 0: {weights[0] / sum(weights):.1%} of the tokens of an epoch" in notes[0]


@pytest.mark.parametrize(("weights", "repeats"), [([3, 1], None), (None, [0.5, 2.0]), (None, None)])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("last_batch", ["fill", "drop"])
def test_rows_of_a_step_are_the_same_on_every_layout_and_after_any_resume(
    weights: list[float] | None, repeats: list[float | None] | None, packing: bool, last_batch: str
) -> None:
    index = make_mix([[1 + number % 9 for number in range(31)], [4] * 20], weights, repeats)

    def data(share: Share) -> TrainData:
        return TrainData(index, SEQ_LEN, packing, 3, 8, share, last_batch)

    alone = data(Share(0, 1, 8))
    steps = [1, 2, 3, 5, 9, 20]
    expected = [alone.rows_of(step) for step in steps]
    for num_ranks, rows in ((1, 3), (2, 2), (4, 1)):
        ranks = [data(Share(rank, num_ranks, rows)) for rank in range(num_ranks)]
        for step, of_step in zip(steps[::-1], expected[::-1], strict=True):
            whole = [batch for rank in ranks for batch in rank.step(step).batches]
            firsts = [int(read_ids(index.read_row(documents)[0])[0]) for _, documents in of_step]
            assert [int(batch.tokens[number, 0]) for batch in whole for number in range(len(batch.tokens))] == firsts
            assert [(epoch, row.tolist()) for epoch, row in ranks[0].rows_of(step)] == [(epoch, row.tolist()) for epoch, row in of_step]


def test_epoch_of_a_mix_holds_what_the_mix_says_once_in_rows() -> None:
    index = make_mix([[1 + number % 9 for number in range(31)], [4] * 20], repeats=[0.5, 2.0])
    data = TrainData(index, SEQ_LEN, True, 3, 8, Share(0, 1, 8))
    rows = [row for step in range(1, data.steps_in_epochs(2) + 1) for row in data.rows_of(step)]
    for epoch, expected in enumerate(counts_of(index, 3, 2)):
        assert Counter(document for of_epoch, row in rows if of_epoch == epoch for document in row.tolist()) == expected


def test_source_of_which_all_is_held_out_is_an_error() -> None:
    index = make_mix([[3, 3], [2]])
    with pytest.raises(DataError, match="source 1: all its documents are held out"):
        build_mix(index.select(index.source == 0))


@pytest.mark.parametrize(("weights", "repeats"), [([1, 0.001], None), (None, [1.0, 0.0025])])
def test_source_of_less_than_one_document_an_epoch_gives_none_in_most_and_never_more(
    weights: list[float] | None, repeats: list[float | None] | None
) -> None:
    index = make_mix([[3] * 50, [6] * 100], weights, repeats)
    mix = build_mix(index)
    epochs = counts_of(index, 0, 200)
    own = [sum(epoch[document] for document in range(50, 150)) for epoch in epochs]
    assert set(own) == {0, 1}
    assert abs(sum(own) - 200 * mix.takes[1]) <= 0.5
    assert max(sum(epochs, Counter())[document] for document in range(50, 150)) == 1  # of 100 documents, each in its turn
    assert f"which is one document in {1 / mix.takes[1]:.3g} epochs" in describe_mix(index, mix)[1]


def test_repeats_so_small_that_an_epoch_may_be_empty_are_an_error_that_names_them() -> None:
    index = make_mix([[3] * 7000, [2] * 10], repeats=[0.00001, 0.01])
    with pytest.raises(
        DataError, match=r"^source 1: repeats = 0\.01 of 10 documents takes less than one document an epoch, and no other source more"
    ):
        build_mix(index)
    assert all(sum(epoch.values()) for epoch in counts_of(make_mix([[3] * 3, [2] * 5], repeats=[1 / 3, 0.15]), 0, 50))


def test_random_numbers_of_a_purpose_are_its_own() -> None:
    purposes = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 0, 0, 1), (0, 0, 0, 2)]
    drawn = {tuple(seeded_random(*purpose).randint(0, 2**30, size=4).tolist()) for purpose in purposes}
    assert len(drawn) == len(purposes)
