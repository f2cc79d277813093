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
from tunelib.files import has_manifest
from tunelib.formats.compare import find_difference, find_faults
from tunelib.formats.source import StoredModel, open_checkpoint


@dataclass(frozen=True)
class Words:
    """Say whether checkpoints are whole, and hold the same weights."""

    first: Annotated[Path, tyro.conf.arg(metavar="A"), tyro.conf.Positional]
    """A checkpoint of any form that is read: a Hugging Face, Meta or DCP folder, or a file of torch.save."""
    second: Annotated[Path | None, tyro.conf.arg(metavar="B"), tyro.conf.Positional] = None
    """Another one, to compare it with."""
    like: Path | None = None
    """A checkpoint that says what the model is, where A does not; where B does not, A's config is taken."""


def unchecked(stored: StoredModel) -> str:
    """What could not be looked at."""
    has_checksums = has_manifest(stored.folder) or not any(name.endswith(".safetensors") for name in stored.form.files)
    return "" if has_checksums else " (there are no checksums to hold its bytes against)"


def size_of(stored: StoredModel) -> int:
    return sum(tensor.info.nbytes for tensor in stored.tensors.values())


def verify(words: Words) -> int:
    fields = open_checkpoint(words.like).fields if words.like else None
    opened = [open_checkpoint(words.first, fields)]
    if words.second is not None:
        opened.append(open_checkpoint(words.second, fields or opened[0].fields))
    faults = []
    for stored in opened:
        with tqdm(total=size_of(stored), unit="B", unit_scale=True, desc=f"reading {stored.path}", disable=None) as bar:
            found = find_faults(stored, bar.update)
        faults += found
        print(f"{stored.sentence}: {len(stored.weights)} weights; {'whole' if not found else 'NOT whole'}{unchecked(stored)}")
    for fault in faults:
        print(f"  {fault}")
    if faults or len(opened) == 1:
        return int(bool(faults))
    total = sum(info.nbytes for stored in opened for info in stored.weights.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing", disable=None) as bar:
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
