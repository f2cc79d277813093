"""Rows of JSON text that is read bit by bit: one array of objects, or objects one after another.

Memory is bounded by the largest object, and the line on which each begins is exact.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunelib.data.raw_lines import MAX_LINE_BYTES, MIB
from tunelib.errors import DataError

Row = dict[str, Any]

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a surrogate pair, with its other half or without
_LONGEST_TOKEN = len("-Infinity") + len("\\u1234")


def read_json(chunks: Iterator[str], path: Path, columns: frozenset[str]) -> Iterator[tuple[int, Row]]:
    """The objects of one array, or of text that has them one after another, with the lines on which they begin.

    Args:
        chunks: the text, in parts of any length; ``path`` is for messages.
        columns: names that a row may have; a lone object with none of them that holds a list of objects is no row.
    """
    scanner = _Scanner(chunks, path)
    after = scanner.peek()
    if after == "[":
        yield from _read_array(scanner)
    elif after:
        line, row = scanner.take_object()
        lists = [key for key, value in row.items() if _is_list_of_objects(value)]
        if not scanner.peek() and lists and columns.isdisjoint(row):
            raise DataError(f"{path}:{line}: one object whose {lists[0]!r} is a list of objects; save the list itself, or its objects one a line")
        yield line, row
        while scanner.peek():
            yield scanner.take_object()


def _read_array(scanner: "_Scanner") -> Iterator[tuple[int, Row]]:
    scanner.skip()
    after = scanner.peek()
    while after != "]":
        yield scanner.take_object()
        after = scanner.peek()
        if after == ",":
            scanner.skip()
            scanner.peek()
        elif after != "]":
            raise scanner.problem("the list goes on with neither ',' nor ']'" if after else "the file ends before its list does")
    scanner.skip()
    if scanner.peek():
        raise scanner.problem("the file goes on after the end of its list")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)


class _Scanner:
    """A place in JSON text that is read bit by bit: what is held reaches from the place to the end of an object, and a little on."""

    def __init__(self, chunks: Iterator[str], path: Path):
        self._chunks = chunks
        self._path = path
        self._text = ""
        self._position = 0
        self._line = 1

    def peek(self) -> str:
        """Go to the next character that is not space, and return it; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._position)
            assert space is not None
            self._move_to(space.end())
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def skip(self) -> None:
        """Go one character on."""
        self._move_to(self._position + 1)

    def take_object(self) -> tuple[int, Row]:
        """The object that begins here, with its line; go to its end."""
        line = self._line
        if self._text[self._position : self._position + 1] != "{":
            raise self.problem(f"not a JSON object: {self._excerpt(self._position)}")
        while True:
            try:
                row, end = _DECODER.raw_decode(self._text, self._position)
                break
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_TOKEN
                if is_cut and len(self._text) - self._position > MAX_LINE_BYTES:
                    advice = "if it holds a list of rows, save the list itself"
                    raise self.problem(f"an object of more than {MAX_LINE_BYTES // MIB} MiB; {advice}") from None
                if not (is_cut and self._read_on()):
                    self._move_to(error.pos)
                    raise self.problem(f"not JSON: {error.msg}: {self._excerpt(error.pos) or 'the file ends'}") from None
            except (ValueError, RecursionError) as error:
                raise self.problem(f"not JSON: {error}") from None
        if has_half_escape(self._text, self._position, end) and (half := find_lone_surrogate(row)):
            raise self.problem(f"{half} is half of a character; no tokenizer can read it")
        self._move_to(end)
        return line, row

    def problem(self, words: str) -> DataError:
        """An error about the place."""
        return DataError(f"{self._path}:{self._line}: {words}")

    def _move_to(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _excerpt(self, position: int) -> str:
        return self._text[position : position + 40].partition("\n")[0]

    def _read_on(self) -> bool:
        """Let go of what lies behind and at least double what lies ahead, so that a long object is not parsed too often."""
        chunks, wanted = [self._text[self._position :]], max(len(self._text) - self._position, 1)
        while wanted > 0 and (chunk := next(self._chunks, "")):
            chunks.append(chunk)
            wanted -= len(chunk)
        if len(chunks) > 1:
            self._text, self._position = "".join(chunks), 0
        return len(chunks) > 1


def find_lone_surrogate(row: Row) -> str:
    """The first half of a surrogate pair that stands alone in a row, as \\ud800 is written, or ""."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""


def has_half_escape(text: str, first: int = 0, end: int | None = None) -> bool:
    """Whether JSON text may hold a lone surrogate: a quick look that spares most rows the thorough one."""
    return _HALF_ESCAPE.search(text, first, len(text) if end is None else end) is not None
