"""The picture shows the curves in the colours of the page."""

from pathlib import Path

import numpy as np
from unit.observe.readers import write_run

from tunelib.observe.picture import COLOURS, draw_picture
from tunelib.observe.runs import load_runs

CSS = Path(__file__).parents[3] / "tunelib/observe/page.css"


def count_pixels(path: Path, colour: str) -> int:
    """How many pixels have a colour, "#rrggbb", to within what drawing does to it."""
    from matplotlib.image import imread

    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(imread(path)[..., :3] * 255 - wanted).max(axis=-1) < 3).sum())


def test_picture_has_the_curves(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a$x$", 2000), write_run(tmp_path / "b_{", 100, scale=0.5)])
    draw_picture(runs, tmp_path / "runs.png")
    assert all(count_pixels(tmp_path / "runs.png", colour) > 500 for colour in COLOURS[:2])
    assert count_pixels(tmp_path / "runs.png", COLOURS[2]) == 0


def test_colours_are_those_of_the_page() -> None:
    assert all(f"--c{number}: {colour};" in CSS.read_text() for number, colour in enumerate(COLOURS))
