"""Fetch a model from the Hugging Face Hub: python scripts/download.py HuggingFaceTB/SmolLM2-135M-Instruct --output_dir assets/SmolLM2"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import FormatError
from tunelib.formats.hub import download_folder


@dataclass(frozen=True)
class Download:
    """Fetch what training needs of a repository on the Hugging Face Hub; HF_TOKEN and HF_ENDPOINT are honoured.

    That is the tokenizer and one form of the weights: safetensors, else pytorch_model*.bin, else Meta's consolidated*.pth. The same
    command goes on with a download that was interrupted: files that are there already are not fetched again.
    """

    repo_id: Annotated[str, tyro.conf.Positional]
    """Such as HuggingFaceTB/SmolLM2-135M-Instruct."""
    output_dir: Path
    """Where the files go."""
    hf_token: str | None = None
    """Token of an account that may read the repository."""
    revision: str | None = None
    """Branch, tag or commit."""
    include: tuple[str, ...] = ()
    """Patterns of files to fetch instead of what training needs."""
    exclude: tuple[str, ...] = ()
    """Patterns of files to leave out; without *.safetensors, for one, the next form of the weights is fetched."""


def main() -> int:
    words = tyro.cli(Download, use_underscores=True)
    try:
        folder = download_folder(words.repo_id, words.output_dir, words.hf_token, words.revision, words.include, words.exclude)
    except FormatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{words.repo_id} is in {words.output_dir}; train it with --checkpoint.initial_load_path {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
