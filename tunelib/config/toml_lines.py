"""Which line of a TOML file each key stands on, since ``tomllib`` gives values without positions.

It reads only what it needs to find keys (strings, brackets, comments) and trusts that ``tomllib`` judges the rest: on text that is
not TOML it stops where it no longer understands. A key's path is a tuple of names, with a number for each place in a list of tables.
"""

import contextlib
import json
import re
from dataclasses import dataclass, field

Path = tuple[str | int, ...]

KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
STRING = re.compile(r'"""(?:[^\\]|\\.)*?"""+|\'\'\'.*?\'\'\'+|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL)
SKIPPED = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
DEEPEST = 100
"""Names in a path; what is deeper is no setting, and the lines of all that is around it would fill the memory."""
BLANK = re.compile(r"[ \t]*")
PLAIN = re.compile(r"[^,\]}#\n]+")


@dataclass
class TomlLines:
    """What ``find_lines`` saw: the line of each path, and each path that was given twice with its second line."""

    lines: dict[Path, int] = field(default_factory=dict)
    repeated: list[tuple[Path, int]] = field(default_factory=list)


def find_lines(text: str) -> TomlLines:
    """The lines (from 1) of every key and table in the text, as far as it can be read."""
    scanner = Scanner(text.replace("\r\n", "\n"))
    with contextlib.suppress(NotToml, RecursionError):
        scanner.read_document()
    return scanner.found


class NotToml(Exception):
    """The text is not TOML here; ``tomllib`` says it better."""


class Scanner:
    """Reads from ``place`` on; each ``read_`` method leaves ``place`` behind what it read."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0
        self.counted = (0, 1)  # a place, and its line: lines are counted from there on, so that a file is read once
        self.found = TomlLines()
        self.list_lengths: dict[Path, int] = {}  # how many [[tables]] each list has so far
        self.headers: set[Path] = set()  # tables that a [header] named

    def read_document(self) -> None:
        table: Path = ()
        while True:
            self.place = self.match(SKIPPED)
            if self.place >= len(self.text):
                return
            if self.text.startswith("[", self.place):
                table = self.read_header()
            else:
                self.read_pair(table)

    def read_header(self) -> Path:
        line, brackets = self.line(), 2 if self.text.startswith("[[", self.place) else 1
        self.place += brackets
        names = self.read_key()
        self.expect("]" * brackets)
        outer = self.in_newest((), names[:-1])
        table = (*outer, names[-1])
        if brackets == 2:
            self.list_lengths[table] = self.list_lengths.get(table, 0) + 1
            table = (*table, self.list_lengths[table] - 1)
        elif table in self.headers:
            self.found.repeated.append((table, line))
        self.headers.add(table)
        self.note(table, line)
        return table

    def read_pair(self, table: Path) -> None:
        line = self.line()
        path = (*table, *self.read_key())
        if path in self.found.lines:
            self.found.repeated.append((path, line))
        self.note(path, line)
        self.expect("=")
        self.read_value(path)

    def read_key(self) -> tuple[str, ...]:
        names: list[str] = []
        while True:
            self.place = self.match(BLANK)
            part = KEY_PART.match(self.text, self.place)
            if part is None:
                raise NotToml
            if len(names) == DEEPEST:
                raise NotToml
            names.append(plain_name(part[0]))
            self.place = part.end()
            self.place = self.match(BLANK)
            if not self.text.startswith(".", self.place):
                return tuple(names)
            self.place += 1

    def read_value(self, path: Path) -> None:
        self.place = self.match(BLANK)
        opening = self.text[self.place : self.place + 1]
        if opening == "[":
            self.read_items(path, "]")
        elif opening == "{":
            self.read_items(path, "}")
        else:
            self.place = self.match(STRING if opening in ("'", '"') else PLAIN, needed=True)

    def read_items(self, path: Path, closing: str) -> None:
        """The inside of a list (``]``) or an inline table (``}``)."""
        self.place += 1
        count = 0
        while True:
            self.place = self.match(SKIPPED)
            if self.text.startswith(closing, self.place):
                self.place += 1
                return
            if closing == "]":
                self.read_value((*path, count))
                count += 1
            else:
                self.read_pair(path)
            self.place = self.match(SKIPPED)
            if self.text.startswith(",", self.place):
                self.place += 1
            elif not self.text.startswith(closing, self.place):
                raise NotToml

    def in_newest(self, path: Path, names: tuple[str, ...]) -> Path:
        """The path of the names, inside the newest entry of every list of tables on the way."""
        for name in names:
            path = (*path, name)
            if path in self.list_lengths:
                path = (*path, self.list_lengths[path] - 1)
        return path

    def note(self, path: Path, line: int) -> None:
        """The line of a path and of what is around it, where they stand for the first time."""
        if len(path) > DEEPEST:
            raise NotToml
        for depth in range(1, len(path) + 1):
            self.found.lines.setdefault(path[:depth], line)

    def match(self, pattern: re.Pattern, needed: bool = False) -> int:
        found = pattern.match(self.text, self.place)
        if found is None:
            if needed:
                raise NotToml
            return self.place
        return found.end()

    def expect(self, characters: str) -> None:
        self.place = self.match(BLANK)
        if not self.text.startswith(characters, self.place):
            raise NotToml
        self.place += len(characters)

    def line(self) -> int:
        place, line = self.counted
        self.counted = (self.place, line + self.text.count("\n", place, self.place))
        return self.counted[1]


def plain_name(part: str) -> str:
    """A key without its quotes and escapes."""
    if part.startswith("'"):
        return part[1:-1]
    if not part.startswith('"'):
        return part
    escaped = re.sub(r"\\U([0-9A-Fa-f]{8})", lambda found: json.dumps(chr(int(found[1], 16)))[1:-1], part)
    try:
        return json.loads(escaped, strict=False)
    except ValueError as error:
        raise NotToml from error
