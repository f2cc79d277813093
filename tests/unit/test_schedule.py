"""The learning rate of a step is a pure function that is never 0, rises, stays and falls as the config says."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelib.config.schema import LrScheduler
from tunelib.schedule import lr_factor

SECTIONS = st.builds(
    LrScheduler,
    warmup_steps=st.integers(0, 40),
    decay_type=st.sampled_from(["constant", "linear", "cosine", "sqrt"]),
    decay_ratio=st.none() | st.floats(0.01, 1),
    min_lr_factor=st.floats(0, 1),
)


def curve(section: LrScheduler, num_steps: int) -> list[float]:
    return [lr_factor(section, step, num_steps) for step in range(1, num_steps + 1)]


@given(SECTIONS, st.integers(1, 60))
def test_rate_rises_over_warmup_and_never_after(section: LrScheduler, num_steps: int) -> None:
    factors = curve(section, num_steps)
    assert all(0 < factor <= 1 for factor in factors)
    warmup, rest = factors[: section.warmup_steps], factors[section.warmup_steps :]
    assert all(a < b for a, b in itertools.pairwise(warmup))
    assert all(a >= b for a, b in itertools.pairwise(rest))
    assert all(factor >= section.min_lr_factor - 1e-12 for factor in rest)


def test_first_step_of_warmup_has_its_share_and_the_last_has_all() -> None:
    assert curve(LrScheduler(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert curve(LrScheduler(), 3) == [1, 1, 1]


@pytest.mark.parametrize(
    ("decay_type", "expected"),
    [
        ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1, 0.904508, 0.654508, 0.345492, 0.095492]),
        ("sqrt", [1, 0.552786, 0.367544, 0.225403, 0.105573]),
    ],
)
def test_decay_has_its_shape_and_would_end_one_step_after_the_run(decay_type: str, expected: list[float]) -> None:
    section = LrScheduler(warmup_steps=1, decay_type=decay_type)  # type: ignore[arg-type]  # a Literal
    assert curve(section, 5) == pytest.approx(expected, abs=1e-6)
    assert lr_factor(section, 6, 5) == pytest.approx(0, abs=1e-12)


def test_rate_is_stable_between_warmup_and_decay() -> None:
    factors = curve(LrScheduler(warmup_steps=2, decay_type="linear", decay_ratio=0.3), 10)
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_decay_goes_down_to_the_least_rate() -> None:
    section = LrScheduler(decay_type="cosine", min_lr_factor=0.1)
    assert lr_factor(section, 101, 100) == pytest.approx(0.1)
    assert 0.1 < lr_factor(section, 100, 100) < 0.11


@pytest.mark.parametrize("decay_type", ["constant", "linear", "cosine", "sqrt"])
def test_warmup_longer_than_the_run_is_still_a_warmup(decay_type: str) -> None:
    section = LrScheduler(warmup_steps=10, decay_type=decay_type, decay_ratio=0.5)  # type: ignore[arg-type]  # a Literal
    assert curve(section, 4) == [0.1, 0.2, 0.3, 0.4]
