"""``python -m tunelib.config FILE [--section.key value …]``: checks a config and shows every value with its origin.

WORLD_SIZE in the environment says for how many processes (default 1). Exit code 2 when something is wrong. ``--docs`` prints
docs/config.md instead.
"""

import os
import sys

from tunelib.config.load import load_or_exit
from tunelib.config.report import render_docs, show_settings


def main(argv: list[str]) -> None:
    if argv == ["--docs"]:
        print(render_docs(), end="")
        return
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdecimal() or int(world_size) < 1:
        print(f"environment: WORLD_SIZE={world_size}: expected the number of processes, at least 1", file=sys.stderr)
        raise SystemExit(2)
    print(show_settings(load_or_exit(argv, world_size=int(world_size))))


if __name__ == "__main__":
    main(sys.argv[1:])
