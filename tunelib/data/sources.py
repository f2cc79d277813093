"""Data files to documents: rows of JSONL read as chats, instructions or text, and plain text files.

Everything wrong with a row is a DataError that begins with ``file:line``.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunelib.config.schema import Columns
from tunelib.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
TEXT_SUFFIXES = (".txt", ".md")
Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a .jsonl file with their line numbers; a plain text file is one row with the column "text".

    Raises:
        DataError: no such file, an unknown kind, bytes that are not UTF-8, or a line that is not a JSON object.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
        raise DataError(f"{path}: no such data file{f'; did you mean {path.with_name(near[0])}?' if near else ''}")
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one .jsonl or .txt file")
    if path.suffix in TEXT_SUFFIXES:
        yield 1, {"text": _decode(path.read_bytes(), str(path))}
    elif path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}:{number}")
    else:
        raise DataError(f"{path}: {path.suffix or 'a file without a suffix'} is not a kind that is read; .jsonl, .txt and .md are")


def detect_format(row: Row, columns: Columns, where: str) -> str:
    """Which of "chat", "instruct" and "text" a row is, by the columns it has.

    Raises:
        DataError: by none or by more than one.
    """
    found = [
        name
        for name, needed in (("chat", (columns.messages,)), ("instruct", (columns.instruction, columns.output)), ("text", (columns.text,)))
        if all(column in row for column in needed)
    ]
    if len(found) != 1:
        raise DataError(
            f"{where}: columns {sorted(row)} fit {' and '.join(found) or 'no format'}: set dataset.format, and dataset.columns for other names"
        )
    return found[0]


def messages_of(row: Row, format: str, columns: Columns, where: str) -> list[dict[str, Any]]:
    """A chat or instruct row as messages, each with a role and a content that is text; raises DataError."""
    if format == "instruct":
        instruction, output = (_text_in(row, column, where) for column in (columns.instruction, columns.output))
        material = _text_in(row, columns.input, where) if row.get(columns.input) else ""
        question = f"{instruction}\n\n{material}" if material else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    messages = row.get(columns.messages)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: column {columns.messages!r} is not a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: message {number} has no role among {', '.join(ROLES)}: {_shorten(message)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} ({message['role']}) has no text in 'content': {_shorten(message)}")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's")
    return messages


def text_of(row: Row, columns: Columns, where: str) -> str:
    """The document of a text row; raises DataError."""
    return _text_in(row, columns.text, where)


def digest_file(path: Path) -> str:
    """A digest of a file's bytes, for the data fingerprint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:32]


def _text_in(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where}: no column {column!r} among {sorted(row)}; dataset.columns names them")
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} is not text: {_shorten(row[column])}")
    return row[column]


def _parse_line(line: bytes, where: str) -> Row:
    try:
        row = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}; a .jsonl file has one JSON object a line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object: {_shorten(row)}")
    return row


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8") from None


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
