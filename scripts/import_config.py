"""Make a tunelib TOML of another trainer's config: a torchtitan TOML (up to 0.2.2), or a torchtune YAML recipe config.

    python scripts/import_config.py llama3_8b.toml --out mine.toml
    python scripts/import_config.py llama2/7B_lora.yaml batch_size=4 --out mine.toml --ngpu 2

Without --out the TOML is printed. What has no counterpart stands at its end, and on stderr, each with the reason (docs/migrate.md).
Exit code 2: nothing could be made of the file, or what was made does not pass the config check.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config.foreign import import_config
from tunelib.errors import ConfigError
from tunelib.files import replace_file


@dataclass(frozen=True)
class Words:
    """Make a tunelib TOML of a torchtitan TOML (up to 0.2.2) or of a torchtune YAML recipe config."""

    file: Annotated[str, tyro.conf.Positional]
    """The config to read."""
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """torchtune's words after its file: key=value, or ~key to remove one."""
    out: Path | None = None
    """Where the TOML goes; it must not be there yet. Without it, it is printed."""
    ngpu: int = 0
    """Processes that it will run on, on which their global batch depends. 0: as the file's comments say, or as few as it needs."""


def run(words: Words) -> int:
    """Import, write and say what is lost; the exit code."""
    if words.ngpu < 0:
        raise ConfigError(f"command line: --ngpu {words.ngpu}: must be at least 1")
    if words.out is not None and (words.out.exists() or not words.out.parent.is_dir()):
        what = "exists already" if words.out.exists() else f"there is no folder {words.out.parent}"
        raise ConfigError(f"command line: --out {words.out}: {what}; give another name")
    imported = import_config(words.file, words.overrides, words.ngpu, str(words.out or "imported.toml"))
    if words.out is None:
        print(imported.text, end="")
    else:
        try:
            replace_file(words.out, imported.text)
        except OSError as error:
            raise ConfigError(f"command line: --out {words.out} cannot be written: {error.strerror}") from None
    for what, why in imported.translation.lost.items():
        print(f"left out: {what}: {why}", file=sys.stderr)
    if imported.problems:
        print("\n".join(["it does not pass the config check yet:", *imported.problems]), file=sys.stderr)
        return 2
    if words.out is not None:
        processes = imported.translation.world_size
        print(f"{words.out} passes the config check for {processes} process{'es' if processes > 1 else ''}; its lines say what they came from")
    return 0


def main() -> int:
    try:
        return run(tyro.cli(Words, use_underscores=True))
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
