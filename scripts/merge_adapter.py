"""Merge an adapter into its base: python scripts/merge_adapter.py BASE ADAPTER OUT [--dtype bfloat16]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from convert_checkpoint import carry_out

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.formats.merge import plan_merge


@dataclass(frozen=True)
class Words:
    """Write BASE's weights with a PEFT adapter merged into them, in BASE's form."""

    base: Annotated[Path, tyro.conf.arg(metavar="BASE"), tyro.conf.Positional]
    """The checkpoint that the adapter was trained beside, in any form."""
    adapter: Annotated[Path, tyro.conf.arg(metavar="ADAPTER"), tyro.conf.Positional]
    """A folder with adapter_config.json and adapter_model.safetensors."""
    target: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """A folder that is empty or not there yet."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Type of all tensors; by default each keeps its own."""


def main() -> int:
    words = tyro.cli(Words, use_underscores=True, description=__doc__)
    merged = f", with the adapter {words.adapter} merged into it,"
    return carry_out(lambda: plan_merge(words.base, words.adapter, words.target, words.dtype or ""), words.target, merged)


if __name__ == "__main__":
    sys.exit(main())
