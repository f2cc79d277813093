"""Other trainers' configs: which one a file is of, and what it becomes here.

torchtitan's TOML files (up to 0.2.2) and torchtune's YAML recipe configs are known; anything else is told what to do instead.
"""

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelib.config.fields import FIELDS, find_nearest, show_value
from tunelib.config.from_torchtitan import translate_torchtitan
from tunelib.config.from_torchtune import translate_torchtune
from tunelib.config.load import load_config
from tunelib.config.renamed import RENAMED, REPLACED, UNBUILT
from tunelib.config.translation import Source, Translation
from tunelib.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS_ALONE = ("base", "lora", "dataset")
"""Tables and keys that no file of torchtitan's has."""
DEEPEST = 20
"""Interpolations inside interpolations."""


@dataclass(frozen=True)
class Imported:
    """A config that was translated."""

    text: str
    """The TOML."""
    translation: Translation
    problems: tuple[str, ...]
    """What the config check says of it; nothing where it passes."""


def import_config(file: str, overrides: Sequence[str] = (), ngpu: int = 0, name: str = "imported.toml") -> Imported:
    """A foreign config as TOML of ours, checked.

    Args:
        overrides: torchtune's key=value, or ~key to remove one.
        ngpu: processes that it will run on; 0: as the file's comments say, or as few as it needs.
        name: of the file that it will be, for messages.

    Raises:
        ConfigError: the file is not there, is no config that is known, or holds a model or recipe that has no counterpart at all.
    """
    text = read_text(file)
    if file.endswith(".toml"):
        if overrides:
            raise ConfigError(f"command line: {overrides[0]}: key=value is for torchtune's files; give run_train.sh --section.key value instead")
        translation = translate_torchtitan(read_toml(file, text), ngpu)
    else:
        translation = translate_torchtune(read_yaml(file, text, overrides), ngpu)
    written = translation.write()
    unreadable = [f"{file}: {what}: {fault}" for what, fault in translation.unreadable.items()]
    return Imported(written, translation, (*unreadable, *find_problems(written, translation.world_size, name)))


def find_problems(text: str, world_size: int, name: str) -> list[str]:
    """What the config check says of a TOML text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "imported.toml"
        path.write_text(text, encoding="utf-8")
        try:
            load_config([str(path)], world_size=world_size)
        except ConfigError as error:
            return [problem.replace(str(path), name) for problem in error.problems]
    return []


def read_text(file: str) -> str:
    kinds = "a TOML file of torchtitan's (up to 0.2.2), or a YAML file of torchtune's"
    if file.endswith(".py"):
        way = "write its values into a TOML file, as docs/migrate.md shows, or give the TOML file that it was made from"
        raise ConfigError(f"{file}: torchtitan's configs after 0.2.2 are Python programs, which are not read here; {way}")
    if not file.endswith((".toml", ".yaml", ".yml")):
        raise ConfigError(f"{file}: is neither .toml nor .yaml; give {kinds}")
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = {path.name: path for path in sorted(Path(file).parent.glob("*.*"))} if Path(file).parent.is_dir() else {}
        near = find_nearest(Path(file).name, beside)
        hint = f"did you mean {beside[near]}?" if near else f"give {kinds}"
        raise ConfigError(f"there is no file {file}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; give {kinds}") from None


def read_toml(file: str, text: str) -> Source:
    """A torchtitan TOML by dotted key."""
    try:
        data = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}; correct it there") from None
    values = dict(flatten(data))
    own = next((key for key in values if key.partition(".")[0] in OURS_ALONE or (key in FIELDS and key.startswith("model.hidden"))), None)
    if own or (values and values.keys() <= FIELDS.keys()):
        shown = f" ('{own}')" if own else ""
        raise ConfigError(f"{file}: is a config of tunelib already{shown}; check it with: python -m tunelib.config {file}")
    known = FIELDS.keys() | RENAMED.keys() | REPLACED.keys() | UNBUILT.keys()
    if not any(key in known for key in values):
        raise ConfigError(f"{file}: is no config of torchtitan's, none of whose keys it has; give one of its TOML files")
    return Source(file, text, values)


def read_yaml(file: str, text: str, overrides: Sequence[str]) -> Source:
    """A torchtune YAML by dotted key, with what the command line says instead, and with interpolations filled in."""
    data = load_yaml(file, text)
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds no keys; give a recipe config of torchtune's, which has model, dataset, optimizer and checkpointer")
    for word in overrides:
        override(data, word)
    values = dict(flatten(data))
    return Source(file, text, {key: fill_in(value, values, f"{file}: {key}") for key, value in values.items()})


def load_yaml(place: str, text: str) -> Any:
    """What YAML says, with numbers such as 2e-5 read as torchtune reads them: PyYAML takes them for text."""
    import yaml  # needed for these files alone

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}; correct it there") from None


def override(data: dict, word: str) -> None:
    """Take key=value or ~key of torchtune's command line into the data; a component is replaced by its path alone."""
    key, equals, value = word.partition("=")
    names = key.removeprefix("~").split(".")
    if not all(names) or bool(equals) == key.startswith("~"):
        raise ConfigError(f"command line: {word}: expected key=value, such as batch_size=4, or ~key to remove one")
    inner = data
    for name in names[:-1]:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    old = inner.get(names[-1])
    if key.startswith("~"):
        if names[-1] not in inner:
            raise ConfigError(f"command line: {word}: the file has no such key; remove this")
        del inner[names[-1]]
    elif isinstance(old, dict) and "_component_" in old:
        old["_component_"] = value
    else:
        inner[names[-1]] = load_yaml(f"command line: {word}", value)


def flatten(data: dict, above: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that is no table, by dotted key."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def fill_in(value: Any, values: dict[str, Any], place: str, depth: int = 0) -> Any:
    """A value with ${other.key} replaced by that key's value, and so on."""
    if isinstance(value, list):
        return [fill_in(item, values, place, depth) for item in value]
    if isinstance(value, dict):
        return {key: fill_in(item, values, place, depth) for key, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value

    def look_up(found: re.Match[str]) -> Any:
        if found[1] not in values or depth == DEEPEST:
            why = "stands for itself" if depth == DEEPEST else "is no key of the file"
            raise ConfigError(f"{place} = {show_value(value)}: {found[1]} {why}; give the key on the command line, as key=value")
        return fill_in(values[found[1]], values, place, depth + 1)

    if (whole := re.fullmatch(r"\$\{([^{}]*)\}", value)) is not None:
        return look_up(whole)  # of the type that it has there
    return re.sub(r"\$\{([^{}]*)\}", lambda found: str(look_up(found)), value)
