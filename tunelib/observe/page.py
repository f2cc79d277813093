"""Runs as one HTML page that needs nothing else: no network, no library, and no script to be read.

Curves are SVG stretched to the width that there is; words and numbers lie over them as text of the page, so that they are as large on a
phone as on a wide screen. A little script shows the values under the pointer.
"""

import json
from html import escape
from importlib.resources import files

from tunelib.config.fields import show_value
from tunelib.observe.curves import CHARTS, Axis, Chart, Curve, curves_of, show_number, show_tick, step_axis, value_axis
from tunelib.observe.runs import Points, RunRecord, differing_settings

SIDE = 1000
"""The curves' own width and height, which are stretched to those of a plot."""
PLOT_HEIGHT = 210
"""In pixels; page.css says so too."""
LABEL_HEIGHT = 15
LABEL_INSIDE = 0.88
"""A curve that ends before this share of the width has its label there, and not at the edge."""
NUM_COLOURS = 8
MAX_DOTS = 60
MAX_PROMPTS = 12
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def build_page(runs: list[RunRecord]) -> str:
    """The page, as text in UTF-8."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    charts = [draw_chart(chart, curves, step_axis(runs), runs) for chart in CHARTS if (curves := curves_of(chart, runs))]
    told = "".join(
        f"<details><summary>{name_of(number, runs)}</summary><pre>{escape(run.summary)}</pre></details>"
        for number, run in enumerate(runs)
        if run.summary
    )
    style, script = (files("tunelib.observe").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">',
        f'<title>{escape(title)} · tunelib</title><link rel="icon" href="data:,"><style>{style}</style></head><body><main>',
        f"<header><h1>{escape(title)}</h1>{describe(runs)}</header>",
        *(show_figures(number, run, runs) for number, run in enumerate(runs)),
        f'<section class="charts">{"".join(charts)}</section>',
        show_settings(runs),
        show_samples(runs),
        f"<section><h2>Summary</h2>{told}</section>" if told else "",
        f"<footer>Drawn by tunelib from {sum(len(points) for run in runs for points in run.series.values()):,} values of metrics.jsonl.</footer>",
        f"</main><script>{script}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def name_of(number: int, runs: list[RunRecord]) -> str:
    """A run's name with its colour before it."""
    return f'<span class="run c{number % NUM_COLOURS}"><i></i>{escape(runs[number].name)}</span>'


def describe(runs: list[RunRecord]) -> str:
    """What the runs say of themselves, where they all say the same."""
    said = {str(run.settings.get("job.description", "")) for run in runs}
    return f"<p>{escape(said.pop())}</p>" if len(said) == 1 and said != {""} else ""


def show_figures(number: int, run: RunRecord, runs: list[RunRecord]) -> str:
    """A run's last figures, those of its curves, in a strip."""
    ends = {chart.name: show_number(curve.main[-1][1]) for chart in CHARTS for curve in curves_of(chart, [run])}
    validation = run.series.get("validation_loss", [])
    first = f"<small>from {show_number(validation[0][1])}</small>" if len(validation) > 1 else ""
    tokens = run.series.get("tokens", [])
    figures = [
        ("steps", f"{run.last_step:,}"),
        ("training loss", ends.get("loss", "")),
        ("validation loss", ends["validation_loss"] + first if validation else ""),
        ("tokens", show_number(tokens[-1][1]) if tokens else ""),
        ("tokens/s", ends.get("tokens_per_second", "")),
        ("peak memory", f"{ends['memory_gib']} GiB" if "memory_gib" in ends else ""),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures if value)
    return f'<section class="strip">{name_of(number, runs) if len(runs) > 1 else ""}<dl>{shown}</dl></section>'


def draw_chart(chart: Chart, curves: list[Curve], steps: Axis, runs: list[RunRecord]) -> str:
    """One chart with its curves, ticks, and the last value at each curve's end."""
    values = value_axis(chart, curves)
    notes = [chart.unit, "log scale" if values.is_log else ""]
    spans = sorted({curve.span for curve in curves if curve.mean})
    notes.append(f"mean of {' or '.join(map(str, spans))} rows" if spans else "")
    lines = [f'<path class="grid" d="M0 {y:.1f}H{SIDE}"/>' for y in (height_of(tick, values) for tick in values.ticks)]
    for curve in curves:
        colour = f"c{curve.number % NUM_COLOURS}"
        if curve.mean:
            lines.append(f'<path class="pale {colour}" d="{path_of(curve.points, steps, values)}"/>')
        lines.append(f'<path class="line {colour}" d="{path_of(curve.main, steps, values)}"/>')
        if len(curve.points) == 1 or (chart.has_dots and len(curve.points) <= MAX_DOTS):
            dots = "".join(f"M{SIDE * steps.place(step):.1f} {height_of(value, values):.1f}h0" for step, value in curve.points)
            lines.append(f'<path class="dots {colour}" d="{dots}"/>')
    said = "; ".join(f"{runs[curve.number].name} from {show_number(curve.main[0][1])} to {show_number(curve.main[-1][1])}" for curve in curves)
    shown = [[[int(step), float(f"{value:.5g}")] for step, value in curve.main] for curve in curves]
    names = [runs[curve.number].name if len(runs) > 1 else "" for curve in curves]
    data = {"last": steps.high, "curves": [[curve.number % NUM_COLOURS, *rest] for curve, *rest in zip(curves, names, shown, strict=True)]}
    marks = [f'<span class="y" style="top:{height_of(tick, values) / SIDE:.2%}">{show_tick(tick)}</span>' for tick in values.ticks]
    marks += [f'<span class="x" style="left:{steps.place(tick):.2%}">{show_tick(tick)}</span>' for tick in steps.ticks]
    return (
        f"<figure><figcaption><b>{chart.title}</b> {', '.join(note for note in notes if note)}</figcaption>"
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(chart.title + ": " + said)}">'
        f"{''.join(lines)}</svg>{''.join(marks)}{''.join(end_labels(curves, steps, values))}</div>"
        f'<script type="application/json">{embed(data)}</script></figure>'
    )


def path_of(points: Points, steps: Axis, values: Axis) -> str:
    """The curve through the points, as an SVG path."""
    return "M" + "L".join(f"{SIDE * steps.place(step):.1f} {height_of(value, values):.1f}" for step, value in points)


def height_of(value: float, values: Axis) -> float:
    """From the top."""
    return SIDE * (1 - values.place(value))


def end_labels(curves: list[Curve], steps: Axis, values: Axis) -> list[str]:
    """The last value at each curve's end; those at the right edge are moved apart where they would lie on each other."""
    by_height = sorted(curves, key=lambda curve: height_of(curve.main[-1][1], values))
    tops = {curve.number: PLOT_HEIGHT * height_of(curve.main[-1][1], values) / SIDE for curve in by_height}
    at_edge = [curve for curve in by_height if steps.place(curve.main[-1][0]) > LABEL_INSIDE]
    tops |= dict(zip((curve.number for curve in at_edge), spread([tops[curve.number] for curve in at_edge]), strict=True))
    return [
        f'<span class="end c{curve.number % NUM_COLOURS}" style="top:{tops[curve.number]:.0f}px'
        f'{"" if curve in at_edge else f";left:{steps.place(curve.main[-1][0]):.2%}"}">{show_number(curve.main[-1][1])}</span>'
        for curve in by_height
    ]


def spread(tops: list[float]) -> list[float]:
    """Heights in pixels, in their order, moved so that labels do not overlap, and stay in the plot while there is room."""
    placed: list[float] = []
    for top in tops:
        placed.append(max(top, placed[-1] + LABEL_HEIGHT) if placed else top)
    limit = float(max(PLOT_HEIGHT, (len(tops) - 1) * LABEL_HEIGHT))
    for at in reversed(range(len(placed))):
        placed[at] = min(placed[at], limit)
        limit = placed[at] - LABEL_HEIGHT
    return placed


def embed(data: object) -> str:
    """JSON that may stand inside of a script element, whatever a name in it says."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def show_settings(runs: list[RunRecord]) -> str:
    """What the runs were told otherwise, side by side; of a single run all it was told."""
    if len(runs) == 1:
        rows = "".join(f"<tr><th>{escape(key)}</th><td>{show_setting(value)}</td></tr>" for key, value in runs[0].settings.items())
        table = f'<details><summary>config.toml</summary><div class="wide"><table>{rows}</table></div></details>'
        return f"<section><h2>Settings</h2>{table}</section>" if rows else ""
    differing = differing_settings(runs)
    if not differing:
        return "<section><h2>Settings</h2><p>All settings are the same.</p></section>"
    head = "".join(f"<th>{name_of(number, runs)}</th>" for number in range(len(runs)))
    rows = "".join(f"<tr><th>{escape(key)}</th>{''.join(f'<td>{show_setting(value)}</td>' for value in values)}</tr>" for key, values in differing)
    return f'<section><h2>What differs</h2><div class="wide"><table><thead><tr><th>setting</th>{head}</tr></thead>{rows}</table></div></section>'


def show_setting(value: object) -> str:
    """As it stands in a TOML file; a dash where it is not set."""
    return "–" if value is None else escape(show_value(value, limit=200))


def show_samples(runs: list[RunRecord]) -> str:
    """Each prompt with every run's first and last answer."""
    prompts = list(dict.fromkeys(str(row["prompt"]) for run in runs for row in run.samples))
    blocks = []
    for prompt in prompts[:MAX_PROMPTS]:
        answers = ""
        for number, run in enumerate(runs):
            own = [row for row in run.samples if row["prompt"] == prompt]
            for row in own[:1] + own[1:][-1:]:
                who = name_of(number, runs) if len(runs) > 1 else ""
                answers += f'<div class="answer">{who}<small>step {row["step"]:,}</small><p>{escape(str(row["answer"]))}</p></div>'
        blocks.append(f'<article><h3>{escape(prompt)}</h3><div class="answers">{answers}</div></article>')
    more = f"<p>{len(prompts) - MAX_PROMPTS} more prompts are in samples.jsonl.</p>" if len(prompts) > MAX_PROMPTS else ""
    return f"<section><h2>Samples</h2>{''.join(blocks)}{more}</section>" if blocks else ""
