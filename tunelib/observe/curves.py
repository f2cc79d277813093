"""What is drawn of a run, whoever draws it: which charts there are, points thinned to what can be seen, means of noisy ones, axes with good ticks."""

import math
from dataclasses import dataclass

import numpy as np

from tunelib.observe.runs import Points, RunRecord

COLUMNS = 500
"""Columns of pixels that a curve is thinned to: each keeps its smallest and its largest value."""
LOG_RATIO = 8.0
"""A chart that may be logarithmic is so where its largest value is so many times its smallest."""
SMOOTH_FROM = 60
"""Points from which on a noisy curve gets its mean, too."""


@dataclass(frozen=True)
class Chart:
    """One chart: a name in metrics.jsonl, and how it is shown."""

    name: str
    title: str
    unit: str
    from_zero: bool = False
    """The axis begins at 0, and is never logarithmic."""
    is_noisy: bool = False
    """Long curves are drawn pale, with their mean over them."""
    has_dots: bool = False
    """Each point is a measurement of its own, and is marked where there are few."""


CHARTS = (
    Chart("loss", "Training loss", "nats per token", is_noisy=True),
    Chart("validation_loss", "Validation loss", "nats per token", has_dots=True),
    Chart("lr", "Learning rate", "", from_zero=True),
    Chart("grad_norm", "Gradient norm", "before clipping", is_noisy=True),
    Chart("tokens_per_second", "Throughput", "tokens per second", from_zero=True, is_noisy=True),
    Chart("memory_gib", "Peak memory", "GiB", from_zero=True),
)


@dataclass(frozen=True)
class Curve:
    """A run in a chart.

    Attributes:
        number: of the run, for its colour.
        points: all that can be seen of them.
        mean: of noisy ones, else empty.
        span: how many points a mean is over.
    """

    number: int
    points: Points
    mean: Points
    span: int = 1

    @property
    def main(self) -> Points:
        """What the eye should follow."""
        return self.mean or self.points


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high`` with ticks at round values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log(number) for number in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return (value - low) / (high - low)


def curves_of(chart: Chart, runs: list[RunRecord]) -> list[Curve]:
    """The curves of a chart; runs that have nothing to show in it are left out."""
    curves = []
    for number, run in enumerate(runs):
        points = run.series.get(chart.name, [])
        if points:
            span = len(points) // 40 if chart.is_noisy and len(points) >= SMOOTH_FROM else 1
            mean = thin(running_mean(points, span)) if span > 1 else []
            curves.append(Curve(number, thin(points), mean, span))
    return curves


def thin(points: Points, columns: int = COLUMNS) -> Points:
    """The first and last point, and of each column of steps the smallest and the largest, in the order of the steps."""
    if len(points) <= 2 * columns:
        return points
    first, last = points[0][0], points[-1][0]
    width = (last - first) / columns or 1.0
    kept = [points[0]]
    begin = 0
    for column in range(columns):
        end = begin
        while end < len(points) and (points[end][0] < first + (column + 1) * width or column == columns - 1):
            end += 1
        if end > begin:
            ends = {min(range(begin, end), key=lambda at: points[at][1]), max(range(begin, end), key=lambda at: points[at][1])}
            kept += [points[at] for at in sorted(ends)]
        begin = end
    return [*kept, points[-1]]


def running_mean(points: Points, span: int) -> Points:
    """The mean of each point and those before it, ``span`` in all; fewer at the beginning."""
    values = np.array([value for _, value in points])
    # Each sum by itself: what is added to a running one and taken away again takes the smaller ones' digits with it.
    begun = [values[: at + 1].mean() for at in range(min(span - 1, len(values)))]
    whole = np.lib.stride_tricks.sliding_window_view(values, span).mean(-1).tolist() if span <= len(values) else []
    return [(step, float(mean)) for (step, _), mean in zip(points, [*begun, *whole], strict=True)]


def value_axis(chart: Chart, curves: list[Curve]) -> Axis:
    """For the values of a chart's curves."""
    values = [value for curve in curves for _, value in curve.points]
    low, high = min(values), max(values)
    if chart.from_zero and low >= 0:
        return linear_axis(0.0, high or 1.0)
    if low > 0 and high / low >= LOG_RATIO:
        return log_axis(low, high)
    spare = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return linear_axis(low - spare if low - spare > 0 or low < 0 else 0.0, high + spare)


def step_axis(runs: list[RunRecord]) -> Axis:
    """From 0 to the last step of any run."""
    last = max(1, *(run.last_step for run in runs))
    step = max(1, round_step(last / 5))
    return Axis(0.0, float(last), tuple(float(tick) for tick in range(0, last + 1, int(step))))


def linear_axis(low: float, high: float, num_ticks: int = 5) -> Axis:
    """Ends at a round value where it begins at 0, else at the values given."""
    step = round_step((high - low) / num_ticks)
    top = math.ceil(high / step - 1e-9) * step if low == 0 else high
    ticks = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(top / step + 1e-9) + 1)]
    return Axis(low, top, tuple(ticks))


def log_axis(low: float, high: float) -> Axis:
    """With ticks at 1, 2 and 5 of each decade, or at powers of ten where those are many."""
    low, high = low * 0.9, high * 1.1
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(ticks) <= 7:
            break
    return Axis(low, high, tuple(ticks[:: math.ceil(len(ticks) / 7)]), is_log=True)


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= least * (1 - 1e-9))


def show_number(value: float) -> str:
    """A number of about three digits that a person reads at a glance: 12.3k, 0.0495, 2.5e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.9995:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.01:
        return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}" if size < 100 else f"{value:.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def show_tick(value: float) -> str:
    """A round number, without zeros at its end."""
    shown = show_number(value)
    return shown.rstrip("0").rstrip(".") if "." in shown and not {"e", "k", "M", "G"} & set(shown) else shown
