"""One data file to its rows or its text, streaming: JSONL, JSON, Parquet, CSV, TSV and plain text, each also as .gz or .zst.

Memory is bounded by the largest row, for Parquet by a row group, and never by the file. Text is UTF-8, with or without a BOM at
the start. Everything wrong with a file is a DataError that names the file, and the line where there is one.
"""

import contextlib
import csv
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from tunelib.data.json_rows import Row, read_json
from tunelib.data.raw_lines import CHUNK_BYTES, COMPRESSIONS, MAX_LINE_BYTES, damage_in, decoded_chunks, lines_of, open_stream
from tunelib.errors import DataError

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
TEXT_PART_CHARS = 1 << 17
PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class RawRow:
    """One row of a source.

    Attributes:
        file: index into `OpenedSource.files`.
        line: the line on which the row begins, or for kinds without lines its number, from 1.
        content: a line of JSONL that `parse_row` still has to read, or a row that was read.
    """

    file: int
    line: int
    content: bytes | Row


@dataclass(frozen=True)
class RawText:
    """A part of one plain-text document, of about TEXT_PART_CHARS, cut after a line end where there is one.

    Attributes:
        file: index into `OpenedSource.files`.
        line: the line on which the part begins.
        is_last: the document ends with it.
    """

    file: int
    line: int
    text: str
    is_last: bool


def kind_of(name: str) -> str:
    """The ending that says how a file is read, such as ".jsonl" for "chat.jsonl.gz"; "" for a kind that is not read."""
    name = name.lower()
    stem = name.rpartition(".")[0] if name.endswith(COMPRESSIONS) else name
    return next((kind for kind in KINDS if stem.endswith(kind)), "")


def read_file(path: Path, number: int, columns: frozenset[str] = frozenset()) -> Iterator[RawRow | RawText]:
    """The rows of a file, or the parts of its text, in order; nothing for an empty file.

    Args:
        number: the file's index among those of its source.
        columns: names that a row may have; they tell a .json file with one row from a row list wrapped in an object.
    """
    kind = kind_of(path.name)
    try:
        with open_stream(path) as stream:
            if kind in (".jsonl", ".ndjson"):
                for line, content in lines_of(stream, path, "one JSON object a line is read; if the file is one JSON array, name it .json"):
                    if content.strip():
                        yield RawRow(number, line, content)
            elif kind in (".txt", ".md"):
                yield from _read_text(stream, path, number)
            else:
                if kind == ".json":
                    rows = read_json(decoded_chunks(stream, path), path, columns)
                elif kind == ".parquet":
                    rows = _read_parquet(stream, path)
                else:
                    rows = _read_table(stream, path, "\t" if kind == ".tsv" else ",")
                for line, row in rows:
                    yield RawRow(number, line, row)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damage_in(path, error) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_text(stream: BinaryIO, path: Path, number: int) -> Iterator[RawText]:
    line, text = 1, ""
    for chunk in decoded_chunks(stream, path):
        text += chunk
        while len(text) > TEXT_PART_CHARS:
            end = text.rfind("\n", 0, TEXT_PART_CHARS) + 1 or TEXT_PART_CHARS
            yield RawText(number, line, text[:end], is_last=False)
            line += text.count("\n", 0, end)
            text = text[end:]
    if text:
        yield RawText(number, line, text, is_last=True)


def _read_table(stream: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV or TSV file whose first line names the columns; all values are text, and quoted ones may hold line ends."""
    csv.field_size_limit(MAX_LINE_BYTES)  # by default 131,072 characters; the limit is the process's, and raising it harms nobody
    reader = csv.reader(_table_lines(stream, path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            hint = "; is a quote opened and not closed?" if "unexpected end of data" in str(error) or "field limit" in str(error) else ""
            raise DataError(f"{path}:{line}: not {delimiter!r}-separated values: {error}{hint}") from None
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path}:{line}: the first line has to name the columns, each once; {repeated[0]!r} stands in it more than once")
        elif len(fields) != len(header):
            raise DataError(f"{path}:{line}: {len(fields)} fields, but the first line names {len(header)} columns")
        else:
            yield line, dict(zip(header, fields, strict=True))


def _table_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    for number, line in lines_of(stream, path, "is it a table?"):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from None


def _read_parquet(stream: BinaryIO, path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers from 1. A compressed file is unpacked into a temporary one first, since its end is read before its start."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: .parquet files need the package pyarrow: pip install pyarrow") from None
    number = 0
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stream
        if path.name.lower().endswith(COMPRESSIONS):
            file = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, file, CHUNK_BYTES)
        if file.seek(0, io.SEEK_END) == 0:
            return
        try:
            parquet = stack.enter_context(pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK_BYTES))
            for batch in parquet.iter_batches(PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise damage_in(path, str(error).partition("\n")[0]) from None
