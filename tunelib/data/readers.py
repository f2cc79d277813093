"""One data file to its rows or its text, streaming: JSONL, JSON, Parquet, CSV, TSV and plain text, each also as .gz or .zst.

Memory is bounded by the largest row, for Parquet by a row group, and never by the file. Text is UTF-8, with or without a BOM at
the start. Everything wrong with a file is a DataError that names the file, and the line where there is one.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from tunelib.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
COMPRESSIONS = (".gz", ".zst")
MAX_LINE_BYTES = 64 << 20
TEXT_PART_CHARS = 1 << 20
CHUNK_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 12  # of a file; what it holds may be 30,000 times as long, and is in memory as a whole
ZSTD_WINDOW_BYTES = 1 << 31  # the most that `zstd --long` writes
PARQUET_BATCH_ROWS = 256
MIB = 1 << 20
Row = dict[str, Any]

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_DECODER = json.JSONDecoder()
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a surrogate pair, with its other half or without
_LONGEST_TOKEN = len("-Infinity") + len("\\u1234")


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
        with _open_stream(path) as stream:
            if kind in (".jsonl", ".ndjson"):
                for line, content in _lines_of(stream, path, "one JSON object a line is read; if the file is one JSON array, name it .json"):
                    if content.strip():
                        yield RawRow(number, line, content)
            elif kind in (".txt", ".md"):
                yield from _read_text(stream, path, number)
            else:
                if kind == ".json":
                    rows = _read_json(stream, path, columns)
                elif kind == ".parquet":
                    rows = _read_parquet(stream, path)
                else:
                    rows = _read_table(stream, path, "\t" if kind == ".tsv" else ",")
                for line, row in rows:
                    yield RawRow(number, line, row)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damage(path, error) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


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


def _damage(path: Path, error: Exception | str) -> DataError:
    return DataError(f"{path} is damaged or cut off: {error}")


def _open_stream(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.lower().endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(path), CHUNK_BYTES))
    return open(path, "rb")


class _ZstdStream(io.RawIOBase):
    """What a .zst file holds; unlike the reader of zstandard, it notices that a file was cut off."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: .zst files need the package zstandard: pip install 'tunelib[data]'") from None
        self._path = path
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unread = b""  # what follows the last frame in what was read of the file
        self._ready = memoryview(b"")
        self._file = open(path, "rb")  # noqa: SIM115  (closed with the stream)

    def readable(self) -> bool:
        return True

    def readinto(self, target: "WriteableBuffer") -> int:
        while not self._ready and self._decompress():
            pass
        place = memoryview(target).cast("B")
        count = min(len(place), len(self._ready))
        place[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _decompress(self) -> bool:
        """Read on; False at the end of the file."""
        content = self._unread or self._file.read(ZSTD_CHUNK_BYTES)
        if not content and self._frame is None:
            return False
        if not content:
            raise _damage(self._path, "it ends in the middle of a frame")
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(content))
        except self._error as error:
            raise _damage(self._path, error) from None
        self._unread = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True


def _lines_of(stream: BinaryIO, path: Path, advice: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, and their numbers; only \\n ends a line, and one that is too long is never held as a whole."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES // MIB} MiB; {advice}")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _decoded_chunks(stream: BinaryIO, path: Path) -> Iterator[str]:
    """All of a stream as text, in parts of at most CHUNK_BYTES characters."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset = 1, 0  # of the first byte that was not decoded
    while True:
        chunk = stream.read(CHUNK_BYTES)
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise DataError(f"{path}:{line}: byte {offset + error.start} of the file is not UTF-8; save it as UTF-8") from None
        if text:
            yield text
        elif not chunk:
            return
        line += text.count("\n")
        offset += len(text.encode())


def _read_text(stream: BinaryIO, path: Path, number: int) -> Iterator[RawText]:
    line, text = 1, ""
    for chunk in _decoded_chunks(stream, path):
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
    for number, line in _lines_of(stream, path, "is it a table?"):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from None


def _read_json(stream: BinaryIO, path: Path, columns: frozenset[str]) -> Iterator[tuple[int, Row]]:
    """The objects of one array, or of a file that has them one after another, with the lines on which they begin."""
    scanner = _JsonScanner(_decoded_chunks(stream, path), path)
    if scanner.peek() == "[":
        yield from _read_array(scanner)
        return
    count = 0
    wrapped = None
    while scanner.peek():
        row = scanner.take_object()
        count += 1
        if count == 1:
            wrapped = row if _wraps_list(row[1], columns) else None
            if wrapped:
                continue
        elif wrapped:
            yield wrapped
            wrapped = None
        yield row
    if wrapped:
        line, content = wrapped
        key = next(key for key, value in content.items() if _is_list_of_objects(value))
        raise DataError(f"{path}:{line}: one object whose {key!r} is a list of objects; save the list itself, or its objects one a line")


def _read_array(scanner: "_JsonScanner") -> Iterator[tuple[int, Row]]:
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


def _wraps_list(row: Row, columns: frozenset[str]) -> bool:
    return columns.isdisjoint(row) and any(_is_list_of_objects(value) for value in row.values())


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)


class _JsonScanner:
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
            space = _JSON_SPACE.match(self._text, self._position)
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
                row, end = _JSON_DECODER.raw_decode(self._text, self._position)
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


def _read_parquet(stream: BinaryIO, path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers from 1. A compressed file is unpacked into a temporary one first, since its end is read before its start."""
    try:
        import pyarrow  # type: ignore[import-untyped]  # has no types
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{path}: .parquet files need the package pyarrow: pip install 'tunelib[data]'") from None
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
            # No threads: the process may be forked while this is read.
            for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _damage(path, str(error).partition("\n")[0]) from None
