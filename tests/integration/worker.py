"""One process of a group that runs train.py for one case after the other (see ``run_processes`` in tests/conftest.py)."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train

if __name__ == "__main__":
    cases, ports = json.loads(sys.argv[1])
    for words, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train.main(words)
