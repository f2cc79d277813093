"""A file's bytes, unpacked where it is a .gz or .zst, as lines or as text, with the place of what is wrong.

Nothing is held but a chunk, or a line of at most MAX_LINE_BYTES.
"""

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from tunelib.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".zst")
MIB = 1 << 20
MAX_LINE_BYTES = 64 * MIB
CHUNK_BYTES = MIB
ZSTD_STEP_BYTES = (16, 1 << 12)  # the least and the most that is unpacked at once: what a step holds may be 30,000 times as long
ZSTD_WINDOW_BYTES = 1 << 31  # the most that `zstd --long` writes


def open_stream(path: Path) -> BinaryIO:
    """What a file holds, unpacked; errors of the unpacking are raised as it is read."""
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
            raise DataError(f"{path}: .zst files need the package zstandard: pip install zstandard") from None
        self._path = path
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unread = b""  # what follows the last frame in what was read of the file
        self._step_bytes = ZSTD_STEP_BYTES[0]
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
        content = self._unread or self._file.read(self._step_bytes)
        if not content and self._frame is None:
            return False
        if not content:
            raise damage_in(self._path, "it ends in the middle of a frame")
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(content))
        except self._error as error:
            raise damage_in(self._path, error) from None
        factor = 2 if len(self._ready) < CHUNK_BYTES // 4 else 0.5 if len(self._ready) > CHUNK_BYTES else 1
        self._step_bytes = min(max(int(self._step_bytes * factor), ZSTD_STEP_BYTES[0]), ZSTD_STEP_BYTES[1])
        self._unread = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True


def lines_of(stream: BinaryIO, path: Path, advice: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends, and their numbers; only \\n ends a line, and one that is too long is never held as a whole."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES // MIB} MiB; {advice}")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def decoded_chunks(stream: BinaryIO, path: Path) -> Iterator[str]:
    """All of a stream as text, in parts of about CHUNK_BYTES."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, offset = 1, 0  # of the first byte that was not decoded
    first, chunk = stream.read(len(codecs.BOM_UTF8)), stream.read(CHUNK_BYTES)
    if first == codecs.BOM_UTF8:
        offset = len(first)
    else:
        chunk = first + chunk
    while True:
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
        chunk = stream.read(CHUNK_BYTES)


def damage_in(path: Path, error: Exception | str) -> DataError:
    """That a file is not what it was when it was written."""
    return DataError(f"{path} is damaged or cut off: {error}")
