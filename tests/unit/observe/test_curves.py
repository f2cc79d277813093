"""Curves are thinned without losing a peak, and axes have round ticks."""

import math
import random

import numpy as np
import pytest

from tunelib.observe.curves import CHARTS, Curve, linear_axis, log_axis, round_step, running_mean, show_number, show_tick, thin, value_axis


def test_thinned_curve_keeps_every_column_s_extremes_and_both_ends() -> None:
    chance = random.Random(0)
    points = [(float(step), chance.gauss(0, 1)) for step in range(1, 100_001)]
    points[54_321] = (54_322.0, 99.0)
    points[54_400] = (54_401.0, -99.0)
    kept = thin(points, columns=500)
    assert len(kept) <= 2 * 500 + 2
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {(54_322.0, 99.0), (54_401.0, -99.0)} <= set(kept)
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    for column in np.array_split(points, 500):  # equally many points in each, since steps are evenly spaced
        inside = [value for step, value in kept if column[0, 0] <= step <= column[-1, 0]]
        assert max(inside) == column[:, 1].max()
        assert min(inside) == column[:, 1].min()


def test_short_curve_is_left_alone() -> None:
    points = [(float(step), 1.0 / step) for step in range(1, 900)]
    assert thin(points) == points


def test_uneven_steps_lose_no_point_at_the_end() -> None:
    points = [(float(step * step), float(step % 7)) for step in range(5000)]
    kept = thin(points, columns=100)
    assert kept[-1] == points[-1]
    assert max(value for _, value in kept) == 6


def test_running_mean_is_numpy_s() -> None:
    values = np.random.default_rng(0).normal(size=200)
    means = running_mean([(float(step), value) for step, value in enumerate(values)], 7)
    expected = [values[max(0, at - 6) : at + 1].mean() for at in range(200)]
    assert [value for _, value in means] == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0013), (0, 98_765), (3.2, 3.4), (-2, 5), (0, 7)])
def test_linear_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    axis = linear_axis(low, high)
    assert 3 <= len(axis.ticks) <= 7
    assert all(axis.low - 1e-9 <= tick <= axis.high + 1e-9 for tick in axis.ticks)
    steps = {round(after - before, 12) for before, after in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert len({f"{step:.6g}" for step in steps}) == 1
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 1


@pytest.mark.parametrize(("low", "high"), [(0.03, 6.8), (1e-6, 10), (2, 17), (1e-12, 1e12)])
def test_log_ticks_are_few_and_equal_ratios_are_equally_far(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.low < low < high < axis.high
    middle = math.sqrt(axis.low * axis.high)
    assert axis.place(middle) == pytest.approx(0.5)


def test_scale_is_logarithmic_where_that_helps_and_never_from_zero() -> None:
    charts = {chart.name: chart for chart in CHARTS}
    steep, flat = (Curve(0, [(1.0, first), (2.0, 0.05)], []) for first in (6.8, 0.06))
    assert value_axis(charts["loss"], [steep]).is_log
    assert not value_axis(charts["loss"], [flat]).is_log
    assert not value_axis(charts["loss"], [Curve(0, [(1.0, 6.8), (2.0, 0.0)], [])]).is_log
    assert (value_axis(charts["lr"], [steep]).is_log, value_axis(charts["lr"], [steep]).low) == (False, 0)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_constant_series_has_an_axis(value: float) -> None:
    for chart in CHARTS:
        axis = value_axis(chart, [Curve(0, [(1.0, value), (2.0, value)], [])])
        assert axis.low < axis.high
        assert 0 <= axis.place(value) <= 1


@pytest.mark.parametrize(
    ("value", "shown", "tick"),
    [
        (0, "0", "0"),
        (0.04949, "0.0495", "0.0495"),
        (0.05, "0.0500", "0.05"),
        (6.8266, "6.83", "6.83"),
        (20, "20.0", "20"),
        (101.4, "101", "101"),
        (9845.2, "9,845", "9,845"),
        (12_345, "12.3k", "12.3k"),
        (150_000, "150k", "150k"),
        (2_500_000, "2.5M", "2.5M"),
        (0.00025, "2.5e-4", "2.5e-4"),
        (0.001, "1e-3", "1e-3"),
        (-0.5, "-0.500", "-0.5"),
    ],
)
def test_numbers_are_short(value: float, shown: str, tick: str) -> None:
    assert show_number(value) == shown
    assert show_tick(value) == tick


def test_round_step_is_no_less_than_asked() -> None:
    for least in (0.3, 1, 1.01, 2.4, 2.6, 7, 99, 1e-5):
        assert least <= round_step(least) * (1 + 1e-9) <= least * 2.6


def test_a_spike_takes_nothing_from_the_means_behind_it() -> None:
    points = [(step, 1e20 if step == 3 else 0.5) for step in range(20)]
    assert running_mean(points, 4)[7:] == [(step, 0.5) for step in range(7, 20)]
