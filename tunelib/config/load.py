"""From a TOML file and a command line to one checked ``Config``, and back to the resolved TOML.

The layers are default < base < file < command line. Everything that is wrong is said at once, before torch is imported.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tunelib.config.argv import read_argv, spell_for_tyro
from tunelib.config.check import Checked, find_conflicts, find_notices
from tunelib.config.effect import has_effect, resolve_effects
from tunelib.config.fields import FIELDS, SECTIONS, TABLE_FIELDS, TABLE_SECTIONS, TABLES, Field, fill_section, is_unset, show_value
from tunelib.config.layers import read_files
from tunelib.config.resolve import resolve_dump_folder
from tunelib.config.schema import Config
from tunelib.config.settings import COMMAND_LINE_LAYER, Origin, Setting
from tunelib.errors import ConfigError

HOW_TO_START = "command line: which config? Give the TOML file first: train_configs/debug_model.toml [--section.key value …]"
RESOLVED_HEADER = "# Every setting of this run that has an effect; the same file starts the same run again.\n"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config and what is known about it."""

    config: Config
    origins: dict[str, Origin]
    """Dotted key → where its value came from; for every key."""
    settings: dict[str, Setting]
    """Dotted key → what was written; without what was dropped."""
    notices: list[str]
    """What the user should hear although nothing is wrong."""


def load_config(argv: list[str], *, world_size: int = 1) -> LoadedConfig:
    """The config of ``FILE --section.key value …`` for so many processes.

    Raises:
        ConfigError: with every problem.
        SystemExit: after ``--help`` was printed.
    """
    line = read_argv(argv)
    files = read_files(line.file) if line.file else None
    problems = (files.problems if files else []) + line.problems
    settings = {setting.key: setting for setting in [*(files.settings if files else []), *line.settings]}  # a higher layer replaces a lower
    if line.wants_help:
        print_help(settings)
    if files is None:
        raise ConfigError([HOW_TO_START, *(problem.message for problem in problems)])
    broken = {key for problem in problems for key in problem.keys}
    effects = resolve_effects({key: setting for key, setting in settings.items() if key not in broken}, broken)
    broken |= {key for problem in effects.problems for key in problem.keys}
    config = build_config(effects.settings)
    checked = Checked(config, effects.settings, line.file, world_size)
    conflicts = find_conflicts(checked, broken)
    messages = [problem.message for problem in [*problems, *effects.problems]] + conflicts
    if messages:
        raise ConfigError(list(dict.fromkeys(messages)))
    origins = {key: effects.settings[key].origin if key in effects.settings else Origin() for key in FIELDS}
    return LoadedConfig(config, origins, effects.settings, [*line.notices, *effects.notices, *find_notices(checked)])


def load_or_exit(argv: list[str], *, world_size: int = 1, speak: bool = True) -> LoadedConfig:
    """``load_config`` for a program: problems go to stderr, one line each, with exit code 2; notices go to stderr too.

    Args:
        speak: whether to print; with several processes, one of them should.
    """
    try:
        loaded = load_config(argv, world_size=world_size)
    except ConfigError as error:
        if speak:
            print("\n".join(error.problems), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if speak:
        for notice in loaded.notices:
            print(notice, file=sys.stderr)
    return loaded


def build_config(settings: dict[str, Setting]) -> Config:
    """The dataclasses with the files' values, and the command line's over them through tyro."""
    words = {key: spell_for_tyro(setting) for key, setting in settings.items() if setting.origin.layer == COMMAND_LINE_LAYER}
    default = fill_config({key: setting.value for key, setting in settings.items() if not words.get(key)})
    return tyro.cli(Config, args=[word for word in words.values() if word], default=default, use_underscores=True)


def fill_config(values: dict[str, object]) -> Config:
    """A Config with these values by dotted key, and defaults elsewhere."""
    built: dict[str, Any] = {section: fill_section(section, SECTIONS, values) for section in SECTIONS if "." not in section}
    return Config(**built)


def print_help(settings: dict[str, Setting]) -> None:
    """Every key with its meaning, type and the value in force; ends the program."""
    tyro.cli(
        Config,
        args=["--help"],
        default=fill_config({key: setting.value for key, setting in settings.items()}),
        use_underscores=True,
        prog="FILE.toml",
        description="Settings of tunelib. Words: FILE.toml [--section.key value …]; the file's values are the defaults shown.",
    )


def resolved_toml(loaded: LoadedConfig) -> str:
    """The settings that have an effect as TOML: nothing derived, paths absolute, ``job.dump_folder`` named."""
    values = {key: read_value(loaded.config, key) for key in FIELDS}
    values["job.dump_folder"] = str(resolve_dump_folder(loaded.config))
    values["job.config_file"] = None
    text = RESOLVED_HEADER
    for section in SECTIONS:
        own = {key: field for key, field in FIELDS.items() if field.section == section and has_effect(key, loaded.settings)}
        text += write_table(f"[{section}]", {field: values[key] for key, field in own.items() if key not in TABLES})
    for table in TABLES:
        for item in values[table]:  # type: ignore[attr-defined]  # a tuple of dataclasses
            text += write_item(table, item)
    return text


def write_table(header: str, values: dict[Field, object]) -> str:
    """A table in TOML, with absolute paths; nothing where all its keys are unset."""
    lines = []
    for field, value in values.items():
        if not is_unset(value):
            if field.path and str(value).endswith(field.path.suffix):
                value = os.path.abspath(str(value))
            lines.append(f"{field.name} = {show_value(value, limit=sys.maxsize)}\n")
    return f"\n{header}\n" + "".join(lines) if lines else ""


def write_item(table: str, item: object) -> str:
    """One table of a list of tables, its keys and the sections inside it; keys at their default are left out."""
    text = ""
    for section in TABLE_SECTIONS:
        if section == table or section.startswith(f"{table}."):
            own = [field for field in TABLE_FIELDS.values() if field.section == section]
            values = {field: read_value(item, field.key.removeprefix(f"{table}.")) for field in own}
            header = f"[[{section}]]" if section == table else f"[{section}]"
            text += write_table(header, {field: value for field, value in values.items() if value != field.default})
    return text


def read_written(path: Path) -> dict[str, object]:
    """What a TOML file says, by dotted key, however it fits today's machine; for the config.toml of other runs."""
    return {setting.key: setting.value for setting in read_files(str(path)).settings}


def describe_changes(before: Path, after: Path) -> str:
    """What one resolved TOML says otherwise than another, in a line; empty for nothing."""
    then, now = read_written(before), read_written(after)

    def show(written: dict[str, object], key: str) -> str:
        return show_value(written[key]) if key in written else "unset"

    return "; ".join(f"{key} {show(then, key)} → {show(now, key)}" for key in FIELDS if then.get(key) != now.get(key))


def check_own_config(path: Path) -> None:
    """Make sure that the run's config.toml does not take the place of a file that somebody wrote; raises ConfigError."""
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(RESOLVED_HEADER):
        raise ConfigError(f"{path} exists and was not written by a run: move it away, or give --job.dump_folder another folder")


def read_value(config: object, key: str) -> object:
    """The value of a dotted key in a dataclass."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
