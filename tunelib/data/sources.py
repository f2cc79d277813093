"""Where documents come from, behind one small interface: a file, a folder, a pattern or a data set on the Hub to raw rows.

Opening a source finds its files and digests them; nothing is parsed before `OpenedSource.rows` is asked. What is wrong with a
source is a DataError that names it, and with a row one that begins with the row's place.
"""

import contextlib
import difflib
import errno
import fnmatch
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunelib.config.schema import Source
from tunelib.data.hub import load_hub, read_hub, stream_hub
from tunelib.data.json_rows import Row, find_lone_surrogate, has_half_escape
from tunelib.data.readers import KINDS, RawRow, RawText, kind_of, read_file
from tunelib.errors import DataError
from tunelib.files import read_json, replace_file, wait_for_lock

if TYPE_CHECKING:
    import datasets

KINDS_IN_WORDS = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}, each also as .gz or .zst"
CARDS = ("README.md", "LICENSE.md", "LICENSE.txt")
"""Files of a folder that tell of the data and are none of it, unless they are named."""
DIGEST_CHUNK_BYTES = 1 << 22
MEMO_MIN_BYTES = 1 << 20
"""A smaller file is digested sooner than a memo of its digest is read."""
SETTLED_SECONDS = 2
"""A file that changed later than this before it was digested may change again without its times showing it: no memo is made."""


@dataclass(frozen=True)
class FileState:
    """What changes when a file does."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class OpenedSource:
    """The files of a source, or its data set on the Hub, ready to be read, any number of times.

    Attributes:
        name: the path, pattern or Hub name as it was given, for messages.
        files: how messages name each file.
        digest: of all files' bytes and names within the source, or of the Hub's name, subset, split and commit.
        size_bytes: as stored on the disk.
        notes: what a person should know, such as files of a folder that are not read.
        dataset: the rows of a Hub data set; None for files.
        columns: names that a row may have.
        revision: the commit of a Hub data set; "" for files.
        states: of each file, when it was digested; none for the Hub, whose commits do not change.
    """

    name: str
    files: tuple[str, ...]
    digest: str
    size_bytes: int
    notes: tuple[str, ...]
    dataset: "datasets.Dataset | datasets.IterableDataset | None" = field(default=None, repr=False)
    columns: frozenset[str] = field(default=frozenset(), repr=False)
    revision: str = ""
    states: tuple[FileState, ...] = field(default=(), repr=False)

    def rows(self) -> Iterator[RawRow | RawText]:
        """All rows and parts of texts, file by file, in the same order each time."""
        if self.dataset is not None:
            yield from read_hub(self.dataset)
        else:
            for number, file in enumerate(self.files):
                yield from read_file(Path(file), number, self.columns)

    def check_unchanged(self) -> None:
        """Refuse files that are not what was digested, so that rows read until now may be others; raises DataError."""
        for file, state in zip(map(Path, self.files), self.states, strict=self.dataset is None):
            try:
                is_same = _state_of(file) == state
            except OSError:
                is_same = False
            if not is_same:
                raise DataError(_changed(file))

    def where(self, file: int, line: int) -> str:
        """The place of a row in words, such as "chat.jsonl:12" or "chat.parquet, row 12"."""
        has_lines = self.dataset is None and kind_of(self.files[file]) != ".parquet"
        return f"{self.files[file]}:{line}" if has_lines else f"{self.files[file]}, row {line}"


def open_source(source: Source, cache_folder: Path) -> OpenedSource:
    """Find and digest the files of a source, or fetch its data set from the Hub.

    Args:
        cache_folder: where digests are kept, so that a file that has not changed is not read for its digest again.

    Raises:
        DataError: nothing to read, or something that cannot be read; the text says which and what to do.
    """
    if source.hub:
        loaded = load_hub(source)
        told = (f"{source.hub}: at commit {loaded.commit}", *loaded.notes)
        return OpenedSource(source.hub, (_place_of(source),), loaded.digest, loaded.size_bytes, told, loaded.dataset, revision=loaded.commit)
    base, paths, others = _find_files(Path(source.path))
    notes: tuple[str, ...] = ()
    if others:
        what = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        notes = (f"{source.path}: {what} of a kind that is not read, for example {others[0]}",)
    digest = hashlib.blake2b(digest_size=16)
    states = []
    for path in paths:
        # A file that is the whole source may be renamed: of its name, only the kind decides its rows.
        name = kind_of(path.name) if path == base else path.relative_to(base).as_posix()
        try:
            content, state = _digest_file(path, cache_folder / "digests")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        digest.update(f"{content} {name}\n".encode("utf-8", "surrogateescape"))
        states.append(state)
    columns = frozenset((*astuple(source.columns), "conversations"))
    size_bytes = sum(state.size for state in states)
    return OpenedSource(source.path, tuple(map(str, paths)), digest.hexdigest(), size_bytes, notes, columns=columns, states=tuple(states))


def open_stream(source: Source) -> OpenedSource:
    """A Hub data set whose rows are fetched when they are asked for; raises DataError."""
    dataset, commit, digest = stream_hub(source)
    return OpenedSource(source.hub, (_place_of(source),), digest, 0, (f"{source.hub}: at commit {commit}",), dataset, revision=commit)


def _place_of(source: Source) -> str:
    return f"{'/'.join(filter(None, (source.hub, source.subset)))}[{source.split}]"


def parse_row(content: bytes | Row, where: str) -> Row:
    """The row in a line of JSONL; a row that was read already is returned as it is.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not one JSON object, or text with half of a surrogate pair in it.
    """
    if not isinstance(content, bytes):
        return content
    try:
        text = content.rstrip(b"\r\n").decode()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} of the line is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; if the file is one JSON array, name it .json" if text.lstrip().startswith("[") else ""
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}; a .jsonl file has one JSON object a line{hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object: {text if len(text) <= 80 else text[:77] + '...'}")
    if has_half_escape(text) and (half := find_lone_surrogate(row)):
        raise DataError(f"{where}: {half} is half of a character; no tokenizer can read it")
    return row


def _find_files(path: Path) -> tuple[Path, list[Path], list[Path]]:
    """What names within the source are relative to, the files to read, and those that are not read because of their kind."""
    found: list[Path]
    if (mode := _mode_of(path)) is None:
        base, found = _match_pattern(path)
    elif stat.S_ISDIR(mode):
        base, found = path, [file for file in _files_below(path) if file.name not in CARDS]
    elif kind_of(path.name):
        base, found = path, [path]
    else:
        raise DataError(f"{path}: {path.suffix or 'a file without a suffix'} is not a kind that is read; {KINDS_IN_WORDS} are")
    found = sorted(set(found), key=lambda file: file.relative_to(base).as_posix())
    paths = [file for file in found if kind_of(file.name)]
    others = [file for file in found if not kind_of(file.name)]
    if not paths:
        there = f"; there are others, for example {others[0]}" if others else ""
        raise DataError(f"{path} holds no file of a kind that is read ({KINDS_IN_WORDS}){there}")
    for file in paths:
        if (mode := _mode_of(file)) is None:
            raise DataError(_missing(file))
        if not stat.S_ISREG(mode):
            raise DataError(f"{file} is a pipe, a socket or a device; data is read more than once, so save it as a file")
    return base, paths, others


def _mode_of(path: Path) -> int | None:
    """The kind of what a path names, links followed; None where there is nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = "is a link that leads back to itself" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise DataError(f"{path} {why}") from None


def _is_folder(path: Path) -> bool:
    mode = _mode_of(path)
    return mode is not None and stat.S_ISDIR(mode)


def _match_pattern(path: Path) -> tuple[Path, list[Path]]:
    """The folder in which a pattern begins, and the files it names, those below folders it names among them."""
    first = next((number for number, part in enumerate(path.parts) if re.search(r"[*?\[]", part)), None)
    if first is None:
        raise DataError(_missing(path))
    base = Path(*path.parts[:first])
    found = list(_matches_below(base, path.parts[first:], ())) if _mode_of(base) is not None else []
    if not found:
        raise DataError(f"{path}: no file matches this pattern")
    return base, [file for match in found for file in (_files_below(match) if _is_folder(match) else (match,))]


def _matches_below(folder: Path, parts: Sequence[str], above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    is_deep = parts[0] == "**"
    if is_deep:
        yield from _matches_below(folder, parts[1:], ())
        above = _add_folder(folder, above)
    for path in _visible_in(folder):
        if is_deep and _is_folder(path):
            yield from _matches_below(path, parts, above)
        elif not is_deep and fnmatch.fnmatchcase(path.name, parts[0]) and (len(parts) == 1 or _is_folder(path)):
            yield from _matches_below(path, parts[1:], ())


def _files_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files at any depth that are not hidden, links followed."""
    above = _add_folder(folder, above)
    for path in _visible_in(folder):
        if _is_folder(path):
            yield from _files_below(path, above)
        else:
            yield path


def _add_folder(folder: Path, above: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The folders on the way here, and this one.

    Raises:
        DataError: it is one of them, so that a link made a circle.
    """
    identity = (folder.stat().st_dev, folder.stat().st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder that it lies in; remove the link, or name the files with a pattern")
    return (*above, identity)


def _visible_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _missing(path: Path) -> str:
    """That a file is missing, and what may have been meant."""
    if path.is_symlink():
        return f"{path} is a link to a file that does not exist"
    names = [other.name for other in _visible_in(path.parent)] if _is_folder(path.parent) else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"{path}: no such data file; did you mean {path.with_name(near[0])}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not kind_of(path.name):
        return f'{path}: no such data file; for a data set on the Hub, write dataset.hub = "{path}"'
    return f"{path}: no such data file"


def _digest_file(path: Path, memos: Path) -> tuple[str, FileState]:
    """A digest of a file's bytes, and the state in which it has it; from its memo where it has one and has not changed since.

    Processes that start at once digest it once.
    """
    if (state := _state_of(path)).size < MEMO_MIN_BYTES:
        return _digest_unchanged(path, state), state
    memo = memos / f"{hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()}.json"
    with contextlib.ExitStack() as stack:
        with _blaming_cache(memos):
            stack.enter_context(wait_for_lock(memo.with_suffix(".lock")))
        state, now = _state_of(path), time.time_ns()
        with contextlib.suppress(DataError):
            known = read_json(memo, DataError)
            if known.get("state") == asdict(state):
                return str(known["digest"]), state
        digest = _digest_unchanged(path, state)
        if now - max(state.mtime_ns, state.ctime_ns) >= SETTLED_SECONDS * 10**9:
            with _blaming_cache(memos):
                replace_file(memo, json.dumps({"path": str(path.absolute()), "state": asdict(state), "digest": digest}) + "\n")
    return digest, state


def _state_of(path: Path) -> FileState:
    found = path.stat()
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _digest_unchanged(path: Path, state: FileState) -> str:
    """The digest of a file that is in a state; raises DataError where it is not when it was read to its end."""
    digest = _digest_bytes(path)
    if _state_of(path) != state:
        raise DataError(_changed(path))
    return digest


def _digest_bytes(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _changed(path: Path) -> str:
    return f"{path} changed while it was read; start again when it is complete"


@contextlib.contextmanager
def _blaming_cache(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}; give dataset.cache_folder another folder") from None
