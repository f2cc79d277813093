"""One process of a group that runs train.py for one case after the other (see ``run_processes`` in tests/conftest.py)."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import free_port

import train
from tunelib.files import replace_file
from tunelib.parallel.runtime import leave, run_main


def run_cases(arguments: list[str]) -> None:
    """Each case's words through train.py, on a port that the first process finds free just then, and tells the others."""
    folder, cases = Path(arguments[0]), json.loads(arguments[1])
    for number, words in enumerate(cases):
        told = folder / f"port-{number}"
        if os.environ["RANK"] == "0":
            replace_file(told, str(free_port()))
        while not told.exists():
            time.sleep(0.005)
        os.environ["MASTER_PORT"] = told.read_text()
        train.main(words)


if __name__ == "__main__":
    leave(run_main(run_cases, sys.argv[1:]))
