"""Is a checkpoint whole, and do two hold the same weights?

    python scripts/verify_checkpoint.py A
    python scripts/verify_checkpoint.py A B

With one: its files against its manifest, its tensors against its config, and whether all numbers are finite. With two also whether they
hold the same weights, whatever their forms; the first difference is named. Exit code 0: yes; 1: no; 2: it cannot be read.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import TunelibError
from tunelib.formats.compare import find_difference, find_faults
from tunelib.formats.source import StoredModel, open_checkpoint


@dataclass(frozen=True)
class Words:
    """Say whether checkpoints are whole, and hold the same weights."""

    first: Annotated[Path, tyro.conf.arg(name="A"), tyro.conf.Positional]
    """A checkpoint of any form."""
    second: Annotated[Path | None, tyro.conf.arg(name="B"), tyro.conf.Positional] = None
    """Another one, to compare it with."""
    like: Path | None = None
    """A checkpoint that says what the model is, where A or B does not."""


def size_of(stored: StoredModel) -> int:
    return sum(tensor.info.nbytes for tensor in stored.tensors.values())


def verify(words: Words) -> int:
    fields = open_checkpoint(words.like).fields if words.like else None
    opened = [open_checkpoint(path, fields) for path in (words.first, words.second) if path is not None]
    faults = []
    for stored in opened:
        with tqdm(total=size_of(stored), unit="B", unit_scale=True, desc=f"reading {stored.path.name}") as bar:
            found = find_faults(stored, bar.update)
        faults += found
        print(f"{stored.sentence}: {len(stored.weights)} weights; {'whole' if not found else 'NOT whole'}")
    for fault in faults:
        print(f"  {fault}")
    if faults or len(opened) == 1:
        return int(bool(faults))
    with tqdm(total=sum(map(size_of, opened)), unit="B", unit_scale=True, desc="comparing") as bar:
        difference = find_difference(opened[0], opened[1], bar.update)
    print(f"{'NOT the same weights: ' + difference if difference else 'the same weights, bit for bit'}")
    return int(bool(difference))


def main() -> int:
    try:
        return verify(tyro.cli(Words, description=__doc__))
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
