"""Draw one or more runs: one HTML page that needs no network, to look at or to send to somebody; or a picture.

    python scripts/plot_runs.py outputs/debug_model
    python scripts/plot_runs.py outputs/first outputs/second --out compared.html --png compared.png

Without --out and --png the page is report.html in the first run's folder. A run may still be going on.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import ConfigError, TunelibError
from tunelib.files import replace_file
from tunelib.observe.page import build_page
from tunelib.observe.picture import draw_picture
from tunelib.observe.runs import load_runs

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Words:
    """What the script takes."""

    runs: list[Path]
    out: Path | None
    png: Path | None


def read_words(argv: list[str]) -> Words:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as outputs/debug_model")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default {PAGE_FILE} in the first folder)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a picture; without --out no page is written")
    words = parser.parse_args(argv)
    return Words(words.runs, words.out, words.png)


def main(argv: list[str]) -> None:
    words = read_words(argv)
    runs = load_runs(words.runs)
    out = words.out or (None if words.png else words.runs[0] / PAGE_FILE)
    for name, path in (("--out", words.out), ("--png", words.png)):
        if path and path.is_dir():
            raise ConfigError(f"{name} {path} is a folder; name a file, such as {path / PAGE_FILE}")
    try:
        if out:
            replace_file(out, build_page(runs))
            print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB; open it in any browser")
        if words.png:
            draw_picture(runs, words.png)
            print(words.png)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out or words.png} cannot be written: {error.strerror}; name another file with --out or --png"
        ) from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TunelibError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
