"""Convert a checkpoint from any form to any other, in bounded memory, proven complete before a byte is written.

python scripts/convert_checkpoint.py IN OUT --to hf
python scripts/convert_checkpoint.py IN OUT --to meta --model_parallel 4
python scripts/convert_checkpoint.py IN OUT.gguf --to gguf --dtype q8_0
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import TunelibError
from tunelib.formats.convert import Conversion, convert, keep_freed_memory, plan_conversion


@dataclass(frozen=True)
class Words:
    """Convert a checkpoint (a Hugging Face, Meta or DCP folder, or a file of torch.save) to another form."""

    source: Annotated[Path, tyro.conf.arg(metavar="IN"), tyro.conf.Positional]
    """What to convert; its form is seen from its files."""
    target: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """A folder that is empty or not there yet; for torch also a .pt file, for gguf a .gguf file."""
    to: Literal["hf", "meta", "dcp", "torch", "gguf"]
    """The form to write."""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "q8_0"] | None = None
    """Type of all tensors; by default each keeps its own. q8_0 is for gguf."""
    like: Path | None = None
    """A checkpoint of the same model whose config and tokenizer to take and, where it has the form to write, files and names."""
    max_shard_size: str = ""
    """Largest size of a file (hf, dcp), such as 5GB, which is the default."""
    model_parallel: int = 0
    """Files that divide every tensor (meta); by default one, or as many as IN or --like has."""
    dcp_names: Literal["hf", "meta"] | None = None
    """Names in a DCP folder; meta: those of torchtitan, with its order of rotary pairs. By default those of IN or --like, where that is one."""


def run(source: Path, target: Path, to: str, **wishes: object) -> int:
    """Convert, with a progress bar; the exit code."""
    return carry_out(lambda: plan_conversion(source, target, to, **wishes), target)  # type: ignore[arg-type]  # tyro has checked them


def carry_out(plan: Callable[[], Conversion], target: Path, merged: str = "") -> int:
    """Do what is planned, with a progress bar; the exit code.

    Args:
        merged: what was added to the source on the way, in words.
    """
    keep_freed_memory()
    try:
        conversion = plan()
        for note in conversion.notes:
            print(f"note: {note}", file=sys.stderr)
        with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
            convert(conversion, bar.update)
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"stopped; nothing is left of {target}", file=sys.stderr)
        return 130
    print(f"{conversion.source.sentence}{merged} is now {target}")
    return 0


def main() -> int:
    words = tyro.cli(Words, use_underscores=True, description=__doc__)
    return run(
        words.source,
        words.target,
        words.to,
        dtype=words.dtype or "",
        like_path=words.like,
        max_shard_size=words.max_shard_size,
        model_parallel=words.model_parallel,
        names=words.dcp_names or "",
    )


if __name__ == "__main__":
    sys.exit(main())
