"""One process of a group that runs train.py for one case after the other (see ``run_processes`` in tests/conftest.py)."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from tunelib.parallel.runtime import leave, run_main


def run_cases(arguments: list[str]) -> None:
    """Each case's words through train.py, on a port of its own."""
    cases, ports = json.loads(arguments[0])
    for words, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train.main(words)


if __name__ == "__main__":
    leave(run_main(run_cases, sys.argv[1:]))
