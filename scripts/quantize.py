"""Round a model's linear layers to eight or four bits, once: python scripts/quantize.py IN OUT [--to int8] [--adapter FOLDER]

OUT is a Hugging Face folder as transformers reads it with torchao, and what scripts/generate.py loads. Needs the extra "torchao".
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import TunelibError
from tunelib.formats.whole import quantize_checkpoint


@dataclass(frozen=True)
class Words:
    """What to round, and where it goes."""

    source: Annotated[Path, tyro.conf.arg(metavar="IN"), tyro.conf.Positional]
    """A checkpoint in any form."""
    target: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """A folder that is empty or not there yet."""
    to: Literal["int8", "int4"] = "int8"
    """int8: a scale for each row; int4: a scale for each 32 weights."""
    adapter: str = ""
    """A PEFT adapter folder, merged first."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of all else, and to compute in; auto is float32."""


def main() -> int:
    words = tyro.cli(Words, use_underscores=True, description=__doc__)
    try:
        print(quantize_checkpoint(words.source, words.target, words.to, words.adapter, words.dtype))
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; nothing is left of {words.target}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
