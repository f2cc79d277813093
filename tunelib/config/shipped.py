"""The configs that are shipped in train_configs/: what each is for, and how one is taken along with the files that it is based on.

A shipped config says in its head what machine it is for, and what memory that needs:

    # For 2 GPUs of 80 GB: 54.21 GiB on each, says scripts/estimate_memory.py FILE --ngpu 2 --model.flavor llama2-7b …
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tunelib.config.fields import find_nearest
from tunelib.config.layers import SHIPPED_CONFIGS
from tunelib.config.load import read_written
from tunelib.errors import ConfigError

HEAD = re.compile(
    r"^# For (?P<machine>[^:\n]+): (?P<gib>[0-9.]+) GiB(?: on each)?, says scripts/estimate_memory\.py FILE (?P<words>--ngpu .*)$", re.M
)
BASE = re.compile(r"""^base *= *["']([^"']+)["']""", re.M)


@dataclass(frozen=True)
class Shipped:
    """One config, as its head says it."""

    path: Path
    description: str
    machine: str
    """Such as "2 GPUs of 80 GB"."""
    memory_gib: str
    """Of the GPU that needs most; as scripts/estimate_memory.py printed it."""
    words: tuple[str, ...]
    """Words behind the file that make scripts/estimate_memory.py print it."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def num_processes(self) -> int:
        return int(self.words[self.words.index("--ngpu") + 1])


def list_shipped(folder: Path = SHIPPED_CONFIGS) -> list[Shipped]:
    """Every shipped config, by name."""
    return [read_shipped(path) for path in sorted(folder.glob("*.toml"))]


def read_shipped(path: Path) -> Shipped:
    """What a shipped config says of itself; raises ConfigError where its head does not say it."""
    head = HEAD.search(path.read_text(encoding="utf-8"))
    if head is None:
        raise ConfigError(f"{path}: has no line '# For MACHINE: N GiB, says scripts/estimate_memory.py FILE --ngpu N …'; add it to its head")
    description = read_written(path).get("job.description", "")
    return Shipped(path, str(description), head["machine"], head["gib"], tuple(head["words"].split()))


def copy_shipped(name: str, target: Path, folder: Path = SHIPPED_CONFIGS) -> list[Path]:
    """Copy a shipped config, and the files that it is based on, into a folder; the copies, its own first.

    Raises:
        ConfigError: there is none of this name, or a file of another content would be replaced.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    stem = name.removesuffix(".toml")
    if stem not in paths:
        near = find_nearest(stem, paths)
        hint = f"did you mean {near}?" if near else "scripts/configs.py ls shows them"
        raise ConfigError(f"no config {name} is shipped; {hint}")
    contents = {target / path.name: path.read_bytes() for path in list_bases(paths[stem])}
    taken = [path for path, content in contents.items() if path.exists() and (not path.is_file() or path.read_bytes() != content)]
    if taken:
        raise ConfigError(f"{taken[0]} exists, and is another file; move it away, or give another folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target}: no folder can be made there: {error.strerror}; give another one") from None
    try:
        for path, content in contents.items():
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{error.filename or target} cannot be written: {error.strerror}") from None
    return list(contents)


def list_bases(path: Path) -> list[Path]:
    """A shipped config and the chain of files that it is based on, which all lie in one folder."""
    found = [path]
    while base := BASE.search(found[-1].read_text(encoding="utf-8")):
        found.append(found[-1].parent / base[1])
        assert found[-1].parent == path.parent, "shipped configs lie side by side"
    return found
