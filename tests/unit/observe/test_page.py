"""The page holds all it needs, says what the rows say, and stays small however long the run was."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

from unit.observe.readers import write_run

from tunelib.observe.page import LABEL_HEIGHT, PLOT_HEIGHT, build_page, spread
from tunelib.observe.runs import load_runs


class Elements(HTMLParser):
    """All elements with their attributes; the ones that are open, to see that each is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_asks_for_nothing(tmp_path: Path) -> None:
    page = build_page(load_runs([write_run(tmp_path / "a", 200), write_run(tmp_path / "b", 300)]))
    elements = Elements(page)
    assert elements.open == []
    assert not [tag for tag, attributes in elements.found if {"src", "srcset", "data", "poster"} & attributes.keys()]
    assert {attributes["href"] for _, attributes in elements.found if "href" in attributes} == {"data:,"}
    assert not re.search(r"https?:|@import|url\(", page)
    assert "default-src 'none'" in page


def test_page_shows_every_series_with_its_last_value(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "a", 40)])
    page = build_page([run])
    for title in ("Training loss", "Validation loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"):
        assert page.count(f"<b>{title}</b>") == 1
    assert page.count('class="end c0"') == 6
    assert 'class="end c0" style="top:' in page
    assert f">{run.series['validation_loss'][-1][1]:.3f}</span>" in page
    assert 'class="dots c0"' in page
    assert "<b>Validation loss</b> nats per token, log scale" in page
    assert "<b>Learning rate</b> </figcaption>" in page


def test_page_of_several_runs_shows_what_differs(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "first", 40), write_run(tmp_path / "second", 40, **{"optimizer.lr": 3e-4})])
    page = build_page(runs)
    assert "<th>optimizer.lr</th><td>0.001</td><td>0.0003</td>" in page
    assert "training.steps" not in page
    assert page.count('class="line c1"') == 6
    same = build_page([runs[0], load_runs([write_run(tmp_path / "third", 40)])[0]])
    assert "All settings are the same." in same


def test_names_prompts_and_answers_are_text_and_not_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<script>alert(1)<", 5)
    (folder / "samples.jsonl").write_text('{"step": 0, "prompt": "</script><img src=x>", "answer": "<b>bold</b> & \\u2028"}\n')
    other = write_run(tmp_path / "plain", 5)
    page = build_page(load_runs([folder, other]))
    assert Elements(page).open == []
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp;" in page


def test_long_run_makes_a_small_page(tmp_path: Path) -> None:
    """A hundred thousand rows; those of two hundred make a page that is not much smaller."""
    page = build_page(load_runs([write_run(tmp_path / "long", 100_000)]))
    assert len(page.encode()) < 300_000


def test_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 6.8, "tokens": 0}\n')
    page = build_page(load_runs([folder]))
    assert page.count("<figure>") == 1
    assert Elements(page).open == []


def test_labels_do_not_overlap_and_stay_inside_while_there_is_room() -> None:
    tops = spread([10.0, 11.0, 12.0, 209.0, 210.0])
    assert all(after - before >= LABEL_HEIGHT for before, after in itertools.pairwise(tops))
    assert tops[0] >= 0
    assert tops[-1] <= PLOT_HEIGHT
    many = spread([5.0] * 30)
    assert all(after - before >= LABEL_HEIGHT for before, after in itertools.pairwise(many))


def test_label_of_a_curve_that_ends_early_is_at_its_end(tmp_path: Path) -> None:
    page = build_page(load_runs([write_run(tmp_path / "long", 96), write_run(tmp_path / "short", 48)]))
    assert len(re.findall(r'<span class="end c1" style="top:\d+px;left:50.00%">', page)) == 6
    assert len(re.findall(r'<span class="end c0" style="top:\d+px">', page)) == 6


def test_heights_are_those_of_the_style_sheet() -> None:
    style = (Path(__file__).parents[3] / "tunelib/observe/page.css").read_text()
    assert f"height: {PLOT_HEIGHT}px" in style
    assert f"line-height: {LABEL_HEIGHT}px" in style
