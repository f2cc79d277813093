"""What comes of another trainer's config: lines of a TOML file, each with what it came from, and what is left out, each with the reason.

A ``Source`` knows which of its keys were looked at, so that none is passed over in silence. Which key becomes what is in
``from_torchtitan.py`` and ``from_torchtune.py``.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunelib.config.effect import list_idle
from tunelib.config.fields import FIELDS, SECTIONS, TABLE_FIELDS, convert_value, find_fault, is_unset, show_value
from tunelib.config.renamed import UNBUILT
from tunelib.config.settings import Origin, Setting

OFF: tuple[object, ...] = (None, False, 0, "", (), [], "none", "disabled")
"""Values that say that something is not wanted."""
WIDTH = 40
"""Columns before a line's comment, where the line is not longer."""


@dataclass
class Source:
    """Another trainer's config: its values by dotted key, in the order of the file."""

    file: str
    text: str
    values: dict[str, object]
    taken: set[str] = field(default_factory=set)
    """Keys that were looked at."""

    def take(self, key: str, default: object = None) -> object:
        """A value, which from now on counts as looked at."""
        self.taken.add(key)
        return self.values.get(key, default)

    def take_all(self, prefix: str) -> list[str]:
        """The keys below a table that nobody has looked at yet; now they are."""
        keys = [key for key in self.left() if key == prefix or key.startswith(f"{prefix}.")]
        self.taken.update(keys)
        return keys

    def left(self) -> list[str]:
        """Keys that nobody has looked at."""
        return [key for key in self.values if key not in self.taken]

    def show(self, key: str) -> str:
        """A key with its value, on one line."""
        return f"{key} = {show_value(self.values[key]) if self.values[key] is not None else 'null'}"


@dataclass(frozen=True)
class Line:
    """A value in the TOML, and what it came from."""

    value: object
    comment: str


@dataclass
class Translation:
    """What is written so far.

    Args:
        trainer: whose config it is, for comments.
    """

    source: Source
    trainer: str
    world_size: int = 1
    """Processes that the batch is meant for."""
    lines: dict[str, Line] = field(default_factory=dict)
    """Dotted key → its line."""
    tables: list[dict[str, Line]] = field(default_factory=list)
    """The tables [[dataset.mix]], by dotted key."""
    lost: dict[str, str] = field(default_factory=dict)
    """What has no counterpart → why, in a few words."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Values of another type than the setting's, which the file must be corrected for → what was expected; among ``lost``, too."""
    needless: dict[str, str] = field(default_factory=dict)
    """What needs no setting here: it is off, always so, or without effect beside the rest → why."""

    def put(self, key: str, value: object, *origins: str, why: str = "") -> None:
        """Write a setting; one that is not built, or a value that may not stand, is left out with the reason.

        Args:
            origins: the source's keys that it came from; where the source has none of them, its trainer's default is named.
        """
        self.source.taken.update(origins)
        given = [origin for origin in origins if origin in self.source.values]
        if key not in FIELDS:
            self.lose(given, explain_unbuilt(key), value)
        elif fault := find_fault(FIELDS[key], value):
            if isinstance(value, str) and FIELDS[key].kind in ("bool", "int", "float"):
                self.leave_out(given, fault, self.unreadable)
            self.lose(given, fault, value)
        else:
            self.lines[key] = Line(convert_value(FIELDS[key], value), self.describe(given, bool(origins), why))

    def describe(self, given: list[str], has_origin: bool, why: str) -> str:
        """A line's comment: where it came from, and a remark."""
        place = ", ".join(self.source.show(key) for key in given) if given else "the default there" if has_origin else ""
        return "; ".join(part for part in (place, why) if part)

    def put_source(self, settings: Mapping[str, tuple[object, str]], in_mix: bool) -> None:
        """Write where data come from: under [dataset], or as one more table of [[dataset.mix]].

        Args:
            settings: name under [dataset] → value and comment.
        """
        if in_mix:
            self.tables.append({f"dataset.mix.{name}": Line(value, why) for name, (value, why) in settings.items() if not is_unset(value)})
        else:
            self.lines |= {f"dataset.{name}": Line(value, why) for name, (value, why) in settings.items() if not is_unset(value)}

    def lose(self, origins: str | Iterable[str], reason: str, value: object = True) -> None:
        """Leave keys of the source out; one that is switched off is lost to nobody.

        Args:
            value: what they would have become; where it says "off", that is the reason.
        """
        if any(value is off or (type(value) is type(off) and value == off) for off in OFF):
            self.spare(origins, "off, as it is here")
        else:
            self.leave_out(origins, reason, self.lost)

    def spare(self, origins: str | Iterable[str], reason: str) -> None:
        """Leave keys of the source out that need no setting here."""
        self.leave_out(origins, reason, self.needless)

    def leave_out(self, origins: str | Iterable[str], reason: str, where: dict[str, str]) -> None:
        for key in [origins] if isinstance(origins, str) else origins:
            self.source.taken.add(key)
            if key in self.source.values:
                where[self.source.show(key)] = reason

    def drop(self, key: str, reason: str) -> None:
        """Take a line back."""
        line = self.lines.pop(key)
        self.lost[line.comment] = reason

    def finish(self) -> None:
        """Take back what has no effect beside the rest; list what nobody has looked at, and what was looked at and is not to be seen."""
        while idle := next(list_idle(self.settings(), set()), None):
            setting, need = idle
            self.needless[self.lines.pop(setting.key).comment] = f"without effect while {need.switch} is {show_switch(need.switch, self.lines)}"
        for key in self.source.left():
            self.lose(key, f"no key of {self.trainer}'s that is known here", self.source.values[key])
        lines = [line.comment for table in (self.lines, *self.tables) for line in table.values()]
        shown = "\n".join([*lines, *self.lost, *self.needless])
        self.spare([key for key in self.source.values if f"{key} = " not in shown], "as it is here")

    def settings(self) -> dict[str, Setting]:
        return {key: Setting(key, line.value, Origin(1, self.source.file)) for key, line in self.lines.items()}

    def write(self) -> str:
        """The TOML: a head, sections in the schema's order, the list of what is left out."""
        where = f"{self.world_size} processes (NGPU={self.world_size})" if self.world_size > 1 else "one process"
        text = f"# For {where}, made of {self.trainer}'s {os.path.basename(self.source.file)} by scripts/import_config.py.\n"
        text += "# Behind each line is what it came from. What has no counterpart stands at the end.\n"
        for section in SECTIONS:
            own = {FIELDS[key].name: line for key, line in self.lines.items() if FIELDS[key].section == section and key != "dataset.mix"}
            text += write_lines(f"[{section}]", own)
        for table in self.tables:
            inner = {section: {} for section in ("dataset.mix", "dataset.mix.columns")}  # type: dict[str, dict[str, Line]]
            for key, line in table.items():
                inner[TABLE_FIELDS[key].section][TABLE_FIELDS[key].name] = line
            text += write_lines("[[dataset.mix]]", inner["dataset.mix"]) + write_lines("[dataset.mix.columns]", inner["dataset.mix.columns"])
        return text + list_left_out("What has no counterpart here:", self.lost) + list_left_out("What needs no setting here:", self.needless)


def explain_unbuilt(key: str) -> str:
    """Why a key that the schema lacks is left out."""
    part = next((part for part in (key, key.rpartition(".")[0], key.partition(".")[0]) if part in UNBUILT), None)
    return f"{UNBUILT[part]} is not built yet" if part else "not built"


def show_switch(key: str, lines: Mapping[str, Line]) -> str:
    value = lines[key].value if key in lines else (FIELDS | TABLE_FIELDS)[key].default
    return "not given" if is_unset(value) else show_value(value)


def write_lines(header: str, lines: Mapping[str, Line]) -> str:
    """A table of the TOML, with comments behind its lines; nothing where there are none."""
    text = ""
    for name, line in lines.items():
        written = f"{name} = {show_value(line.value, limit=sys.maxsize)}"
        text += f"{written:{WIDTH}}  # {in_one_line(line.comment)}\n" if line.comment else f"{written}\n"
    return f"\n{header}\n{text}" if text else ""


def list_left_out(title: str, left_out: Mapping[str, str]) -> str:
    """Comments at the file's end; nothing for nothing."""
    lines = "".join(f"#   {in_one_line(what)}: {in_one_line(why)}\n" for what, why in left_out.items())
    return f"\n# {title}\n{lines}" if lines else ""


def in_one_line(text: str) -> str:
    """Text that may stand in a comment of TOML, which has no line breaks and no control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
