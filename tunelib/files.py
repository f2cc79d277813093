"""Making files and folders final: write, fsync, manifest with checksums, rename; verify, set aside, remove, lock.

This is the only code that gives a folder its final name. A folder is built under a staging name (a leading dot, so that no
reader takes it for the real thing) and exists once `commit_folder` has returned: every file is on disk, the manifest, written
last, holds each file's size and crc32 and, of itself, a crc32 too, and the parent directory knows the new name.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from tunelib.errors import CheckpointError, ConfigError, TunelibError, UnreachableError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
OLDER_FORMAT = 1
"""Of manifests without a checksum of their own, which are read as they are."""
# Endings of what is being built, removed, or exchanged; what carries them is ours to clear away, so nobody else's may.
STAGING, REMOVED, OLD, LOCK = ".tunelib-staging", ".tunelib-removed", ".tunelib-old", ".tunelib-lock"
CHUNK_BYTES = 1 << 22
WRITE_BYTES = 1 << 18  # what stays in the processor's cache between checksum and write
SEND_BYTES = 1 << 25
OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""What an OSError says of the file itself."""
CHECKING_THREADS = 2


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes | str) -> None:
    """Give a file new content so that a reader sees the old one or the new one, never a part."""
    staging = staging_of(path)
    write_file(staging, content)
    os.replace(staging, path)
    sync_path(path.parent)


def read_json(path: Path, error: type[TunelibError], missing: str = "is missing") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        error: what is raised, naming the file, where it is missing, cannot be read, or holds something else.
        missing: what is said of a file that is not there.
    """
    try:
        content = json.loads(_read_text(path))
    except FileNotFoundError:
        raise error(f"{path} {missing}") from None
    except (OSError, ValueError, RecursionError) as problem:
        _check_reachable(path, problem)
        raise error(f"{path} cannot be read: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path} cannot be read: it is not a JSON object")
    return content


def sync_path(path: Path) -> None:
    """Wait until the disk has what a file or a directory holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, as far as they are missing, and wait until the disk has their names."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        path.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # of a folder in which one may make others, and not look
            sync_path(path.parent)


def crc32_of(path: Path) -> int:
    """The crc32 of a file's bytes."""
    return _checksums_of(path, sha256=False)[0]


class ChecksummedFile:
    """A file that is written from front to back, and knows its checksum when it ends.

    Use as a context; `finish` waits until the disk has it.
    """

    def __init__(self, path: Path):
        self.size, self.crc32, self._sent = 0, 0, 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (this object is the context)

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; returns how many."""
        view = memoryview(data)
        for begin in range(0, len(view), WRITE_BYTES):
            block = view[begin : begin + WRITE_BYTES]
            self.crc32 = crc32(block, self.crc32)
            while block:
                block = block[self._file.write(block) :]
        self.size += len(view)
        if self.size - self._sent >= SEND_BYTES:
            _start_writing(self._file.fileno(), self._sent, self.size - self._sent)
            self._sent = self.size
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> dict[str, int]:
        """Wait until the disk has the file; its size and crc32, as a manifest lists them."""
        os.fsync(self._file.fileno())
        return {"size": self.size, "crc32": self.crc32}


def list_files(folder: Path) -> list[str]:
    """Relative names of all files below a folder but its manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def describe_files(folder: Path, names: Iterable[str], sha256: bool = False) -> dict[str, dict[str, Any]]:
    """Size in bytes, crc32 and, where it is asked for, sha256 of the named files, as a manifest lists them."""
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        checksum, digest = _checksums_of(folder / name, sha256)
        described[name] = {"size": (folder / name).stat().st_size, "crc32": checksum} | ({"sha256": digest} if sha256 else {})
    return described


def staging_of(final: Path) -> Path:
    """Where a folder is built before it gets its name."""
    return final.with_name(f".{final.name}{STAGING}")


def make_staging(final: Path) -> Path:
    """An empty folder beside ``final`` to build it in; what an earlier, interrupted attempt left there is removed."""
    make_folder(final.parent)
    staging = staging_of(final)
    remove_folder(staging)
    staging.mkdir()
    return staging


def commit_folder(staging: Path, final: Path, files: dict[str, dict[str, int]], **facts: Any) -> None:
    """Make a staged folder final: fsync its files, write the manifest last, rename, fsync the parent.

    Args:
        files: what `describe_files` said of every file in it.
        facts: further manifest entries, such as ``kind`` and ``step``.

    An older folder of that name and of the same kind is exchanged with the new one in a single step where the system can (Linux),
    and then removed.

    Raises:
        ConfigError: the name belongs to something else.
    """
    check_replaceable(final, facts.get("kind"))
    for name in files:
        sync_path(staging / name)
    for directory in {(staging / name).parent for name in files} | {staging}:
        sync_path(directory)
    manifest = {"format": MANIFEST_FORMAT, **facts, "files": files}
    write_file(staging / MANIFEST, json.dumps(manifest | {"crc32": _checksum(manifest)}, indent=1) + "\n")
    sync_path(staging)
    if final.exists():
        _exchange(staging, final)
        sync_path(final.parent)
        remove_folder(staging)
    else:
        os.rename(staging, final)
        sync_path(final.parent)


def commit_file(staged: Path, final: Path) -> None:
    """Give a file that is whole its name, which must be free: FileExistsError else, and the file that has it stays."""
    sync_path(staged)
    os.link(staged, final)
    sync_path(final.parent)


def check_replaceable(final: Path, kind: str | None) -> None:
    """Make sure that a name is free, or that of an older folder of the same kind: nothing of others is ever replaced."""
    try:
        is_empty = final.is_dir() and not any(final.iterdir())
        free = not final.exists() or is_empty or read_manifest(final).get("kind") == kind
    except CheckpointError:
        free = False
    if not free:
        raise ConfigError(f"{final} exists and was not written by a run: move it away, or give --job.dump_folder another folder")


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of ours: others have files of that name too. One that cannot be read counts, as damaged."""
    try:
        content = json.loads(_read_text(folder / MANIFEST))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(content, dict) and {"format", "files"} <= content.keys()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder.

    Raises:
        CheckpointError: it is missing, is not JSON, or is not a manifest of a format that this version reads.
    """
    path = folder / MANIFEST
    manifest = read_json(path, CheckpointError, "is missing: the folder was never finished")
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("format") not in (OLDER_FORMAT, MANIFEST_FORMAT):
        raise CheckpointError(f"{path} is not a manifest of format {MANIFEST_FORMAT}")
    if manifest["format"] != OLDER_FORMAT and manifest.pop("crc32", None) != _checksum(manifest):
        raise CheckpointError(f"{path} is damaged: its checksum is not the one at its end")
    for name, entry in files.items():
        if not lies_inside(name):
            raise CheckpointError(f"{path} names {name!r}, which lies outside the folder")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), int) for key in ("size", "crc32")):
            raise CheckpointError(f"{path} does not give size and crc32 of {name!r}")
    return manifest


def lies_inside(name: str) -> bool:
    """Whether a relative name that a stranger's file gives is one that a file below its folder can have."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return not (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name)


def _checksums_of(path: Path, sha256: bool) -> tuple[int, str]:
    """The crc32 and the sha256, in hexadecimal, of a file's bytes; "" for the second where it is not asked for."""
    checksum, digest = 0, hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = crc32(chunk, checksum)
            if sha256:
                digest.update(chunk)
    return checksum, digest.hexdigest() if sha256 else ""


def _checksum(manifest: dict[str, Any]) -> int:
    """Of what a manifest says, however it is written."""
    return crc32(json.dumps(manifest).encode())


def find_damage(folder: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    """What is wrong with the named files of a committed folder, one sentence each; nothing where all is well.

    Raises:
        UnreachableError: the disk does not answer just now.
    """

    def examine(name: str) -> str:
        path, expected = folder / name, files[name]
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{path} is not a file"
            if status.st_size != expected["size"]:
                return f"{path} has {status.st_size} bytes instead of {expected['size']}"
            checksum, digest = _checksums_of(path, sha256="sha256" in expected)
            is_whole = checksum == expected["crc32"] and digest == expected.get("sha256", "")
            return "" if is_whole else f"{path} is damaged: its checksum is not the one in {MANIFEST}"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            _check_reachable(path, error)
            return f"{path} cannot be read: {error.strerror}"

    with concurrent.futures.ThreadPoolExecutor(CHECKING_THREADS) as pool:  # reading and crc32 let other threads run
        return [problem for problem in pool.map(examine, names) if problem]


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a folder to ``<name>.<reason>-K`` with the first free K, and return its new path."""
    number = 0
    while (target := folder.with_name(f"{folder.name}.{reason}-{number}")).exists():
        number += 1
    os.rename(folder, target)
    sync_path(folder.parent)
    return target


def remove_folder(folder: Path) -> None:
    """Remove a folder so that an interruption leaves no half of it under its own name."""
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return
    trash = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}{REMOVED}")
    if trash != folder:
        _remove(trash)
        os.rename(folder, trash)
        sync_path(folder.parent)
    _remove(trash)


def prepare_folder(folder: Path) -> None:
    """Make sure that folders can be made in a folder, if it is there, and remove what is left of interrupted work; raises OSError."""
    if folder.is_dir():
        probe = folder / f".probe{STAGING}"
        probe.mkdir(exist_ok=True)
        remove_debris(folder)


def remove_debris(folder: Path) -> None:
    """Remove what interrupted saves and removals left in a folder; an interrupted exchange is undone."""
    for path in folder.glob(f".*{OLD}"):
        name = folder / path.name[1:].removesuffix(OLD)
        _remove(path) if name.exists() else os.rename(path, name)
    for path in folder.glob(".*"):
        if path.is_dir() and path.name.endswith((STAGING, REMOVED)):
            _remove(path)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one writer; the system lets go when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    try:
        make_folder(folder)
        file = open(folder / ".lock", "a")  # noqa: SIM115  (the with is below, outside of the try)
    except OSError as error:
        raise ConfigError(f"job.dump_folder: {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing to {folder}: wait for it, or give --job.dump_folder another folder") from None
        yield


@contextlib.contextmanager
def hold_name(final: Path) -> Iterator[None]:
    """Hold the name of something that is about to be written, for one writer; the system lets go when the process ends.

    Raises:
        ConfigError: another process holds it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.name}{LOCK}")
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise ConfigError(f"another process is writing {final}: wait for it, or give another name")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def wait_for_lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, after whoever holds it now; the system lets go when a process ends, however it ends.

    Args:
        waiting: called once where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_reachable(path: Path, problem: Exception) -> None:
    """Raise UnreachableError for what says nothing of a file, such as no connection to its server."""
    if isinstance(problem, OSError) and problem.errno not in OF_THE_FILE:
        raise UnreachableError(f"{path} cannot be read just now: {problem}; nothing was changed, so start again when it can") from None


def _read_text(path: Path) -> str:
    """A file's text; raises OSError for what is no file, since a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a file")
    return path.read_text(encoding="utf-8")


def _start_writing(descriptor: int, offset: int, count: int) -> None:
    """Have the system begin to write a part of a file to the disk, without waiting, so that the fsync at its end has little left to do."""
    if sys.platform == "linux":
        sync_file_range_write = 2
        libc = ctypes.CDLL(None)
        if hasattr(libc, "sync_file_range"):
            libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), sync_file_range_write)


def _exchange(first: Path, second: Path) -> None:
    """Swap the names of two folders, in one step on Linux, else through a third name."""
    if sys.platform == "linux":
        at_cwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0:
            return
    old = second.with_name(f".{second.name}{OLD}")
    remove_folder(old)
    os.rename(second, old)  # `remove_debris` takes it back if the next line is never reached
    os.rename(first, second)
    os.rename(old, first)
