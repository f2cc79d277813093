"""scripts/plot_runs.py, and its page in a real browser: no error, no request, curves that can be seen, on a phone and on a desk."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_script
from unit.observe.readers import write_run
from unit.observe.test_picture import count_pixels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BLUE, ORANGE, BLUE_IN_THE_DARK = "#2563eb", "#ea580c", "#60a5fa"


def plot(*words: str | Path) -> subprocess.CompletedProcess:
    return run_script("plot_runs.py", *words)


def browse(page: Path, folder: Path, width: int, *flags: str) -> tuple[Path, str, list[str]]:
    """A page in headless Chromium: the screenshot, what it said on the console, and what the page asked for."""
    picture, log = folder / f"{page.stem}-{width}.png", folder / f"{page.stem}-{width}.json"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    seen = [f"--screenshot={picture}", f"--window-size={width},2400", f"--log-net-log={log}", "--enable-logging=stderr", "--hide-scrollbars"]
    words = [str(CHROMIUM), *quiet, *seen, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr[-3000:]
    text = log.read_text()
    kinds = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")
    begun = kinds["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in kinds["events"] if event["type"] == begun and "url" in event.get("params", {})]
    asked = [request["url"] for request in requests if request["initiator"] != "not an origin"]  # which is the browser itself
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return picture, said, asked


def test_script_writes_the_page_beside_the_run_and_a_picture_where_asked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 30)
    done = plot(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder / 'report.html'}: ")
    other = write_run(tmp_path / "other", 30)
    done = plot(folder, other, "--out", tmp_path / "both.html", "--png", tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    assert "<h1>2 runs</h1>" in (tmp_path / "both.html").read_text()
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_script_says_what_is_wrong(tmp_path: Path) -> None:
    done = plot(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is no run folder: it has no metrics.jsonl" in done.stderr
    folder = write_run(tmp_path / "run", 3)
    done = plot(folder, "--out", tmp_path)
    assert (done.returncode, "is a folder; name a file, such as" in done.stderr) == (2, True)
    done = plot(folder, "--out", tmp_path / "nowhere/page.html")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be written: No such file or directory; name another file" in done.stderr
    (folder / "metrics.jsonl").write_text("nonsense\n")
    done = plot(folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "metrics.jsonl:1: is no row" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_page_in_a_browser(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "first", 3000), write_run(tmp_path / "second", 2000, scale=0.6)]
    page = tmp_path / "page.html"
    assert plot(*runs, "--out", page).returncode == 0
    for width, flags, blue in ((1200, [], BLUE), (400, [], BLUE), (500, ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"], None)):
        picture, said, asked = browse(page, tmp_path, width, *flags)
        assert said == ""
        assert asked == []
        if blue:
            assert count_pixels(picture, blue) > 1500
            assert count_pixels(picture, ORANGE) > 1500


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_browser_test_would_see_an_error_and_a_request(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/x.png"><script>undefined_name()</script>')
    _, said, asked = browse(page, tmp_path, 400)
    assert "undefined_name is not defined" in said
    assert asked == ["http://127.0.0.1:9/x.png"]
