"""Runs as one PNG, for terminals without a browser: the charts of the page, drawn by matplotlib."""

from pathlib import Path
from typing import Any

from tunelib.errors import ConfigError
from tunelib.observe.curves import CHARTS, Chart, Curve, curves_of, show_number, show_tick, step_axis, value_axis
from tunelib.observe.runs import RunRecord

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#a16207", "#475569")
"""Those of page.css."""
INK, SOFT, LINE = "#16191d", "#626b78", "#e7e9ed"


def draw_picture(runs: list[RunRecord], path: Path) -> None:
    """Write the picture.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError("--png needs the package matplotlib: pip install matplotlib") from None
    charts = [(chart, curves) for chart in CHARTS if (curves := curves_of(chart, runs))]
    num_rows = -(-len(charts) // 2)
    figure = Figure(figsize=(12, 3.1 * num_rows + 0.6), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")
    FigureCanvasAgg(figure)
    for number, (chart, curves) in enumerate(charts):
        draw_chart(figure.add_subplot(num_rows, 2, number + 1), chart, curves, runs)
    # matplotlib takes $…$ for formulas, and names may hold dollars
    figure.suptitle(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", parse_math=False, color=INK, fontsize=14, fontweight="bold")
    if len(runs) > 1:
        handles = [figure.axes[0].plot([], [], color=COLOURS[number % len(COLOURS)], linewidth=2)[0] for number in range(len(runs))]
        legend = figure.legend(handles, [run.name for run in runs], loc="outside lower center", ncols=4, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, format="png")


def draw_chart(axes: Any, chart: Chart, curves: list[Curve], runs: list[RunRecord]) -> None:
    """One chart, with the last value at each curve's end."""
    values, steps = value_axis(chart, curves), step_axis(runs)
    axes.set_yscale("log" if values.is_log else "linear")
    for curve in curves:
        colour = COLOURS[curve.number % len(COLOURS)]
        if curve.mean:
            axes.plot(*zip(*curve.points, strict=True), color=colour, linewidth=0.8, alpha=0.32)
        marker = "o" if len(curve.points) == 1 or chart.has_dots else None
        axes.plot(*zip(*curve.main, strict=True), color=colour, linewidth=1.8, marker=marker, markersize=4)
        step, value = curve.main[-1]
        where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(show_number(value), (step, value), color=colour, fontsize=9, fontweight="bold", annotation_clip=False, **where)
    axes.set_xlim(steps.low, steps.high)
    axes.set_ylim(values.low, values.high)
    axes.set_xticks(steps.ticks, [show_tick(tick) for tick in steps.ticks])
    axes.set_yticks(values.ticks, [show_tick(tick) for tick in values.ticks])
    axes.minorticks_off()
    axes.tick_params(length=0, labelcolor=SOFT, labelsize=9)
    axes.grid(axis="y", color=LINE)
    axes.spines[:].set_visible(False)
    axes.set_title(
        ", ".join(note for note in (chart.title, chart.unit, "log scale" if values.is_log else "") if note), loc="left", color=INK, fontsize=11
    )
