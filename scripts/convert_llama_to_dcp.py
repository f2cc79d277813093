"""Make a Meta folder into a DCP folder: python scripts/convert_llama_to_dcp.py IN OUT (convert_checkpoint.py IN OUT --to dcp)"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from convert_checkpoint import run


@dataclass(frozen=True)
class Words:
    """Make Meta's consolidated.*.pth and params.json into a DCP folder that training starts from."""

    source: Annotated[Path, tyro.conf.arg(metavar="IN"), tyro.conf.Positional]
    """The Meta folder."""
    target: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """A folder that is empty or not there yet."""


if __name__ == "__main__":
    words = tyro.cli(Words, description=__doc__)
    sys.exit(run(words.source, words.target, "dcp"))
