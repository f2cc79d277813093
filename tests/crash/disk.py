"""A disk that fails, as disk.c makes it; and what a power loss leaves of it, replayed from what disk.c wrote down."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


def build(folder: Path) -> Path:
    """Compile disk.c; the library that LD_PRELOAD takes."""
    library = folder / "disk.so"
    source = Path(__file__).with_name("disk.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


def arm(under: str, kill_at: int = 0, kinds: str = "", first: int = 1, last: int = 1 << 62, error: int = 0, wait: float = 0.0, log: str = "") -> None:
    """Begin to count the changes of this process below a folder, which disk.c does where it is preloaded.

    Args:
        kill_at: the change at which the process is killed, counted from 1.
        kinds: of changes that fail with ``error``, from the ``first`` to the ``last``: w writes, f fsyncs, c creates, r renames …
        wait: seconds before each change.
        log: a file that all changes are written to.
    """
    call = ctypes.CDLL(None).disk_arm
    call.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
    call(under.encode(), kill_at, kinds.encode(), first, last, error, int(wait * 1e6), log.encode())


def disarm() -> int:
    """Stop counting; how many changes there were."""
    return ctypes.CDLL(None).disk_disarm()


@dataclass(frozen=True)
class Change:
    """One change below a folder.

    ``kind``: c(reate) t(runcate) w(rite) f(sync) r(ename) x (exchange) m(kdir) d (rmdir) u(nlink) l(ink) s (a new size).
    """

    time: int
    kind: str
    path: str
    second: str
    data: bytes
    offset: int


def read_changes(logs: list[Path]) -> list[Change]:
    """What several processes did, in the order in which it was done."""
    return sorted((change for log in logs for change in _read_log(log)), key=lambda change: change.time)


def _read_log(log: Path) -> Iterator[Change]:
    with open(log, "rb") as file:
        while head := file.readline():
            time, kind, size, offset, paths = head.decode().rstrip("\n").split(" ", 4)
            path, second = paths.split("\t")
            yield Change(int(time), kind, path, second, file.read(int(size)), int(offset))


@dataclass
class Node:
    """A file or a folder, as the system sees it, and as it would be after a power loss: what was there at its last fsync."""

    data: bytearray | None = None  # of a file
    names: dict[str, "Node"] = field(default_factory=dict)  # of a folder
    synced_data: bytes = b""
    synced_names: dict[str, "Node"] = field(default_factory=dict)

    def sync(self) -> None:
        """What fsync does."""
        self.synced_data, self.synced_names = bytes(self.data or b""), dict(self.names)


class Disk:
    """A disk with one folder, and what is lost with the power.

    Args:
        root: the folder, as the changes name it; it is empty, and on the disk.
    """

    def __init__(self, root: str):
        self._root, self._top = root, Node()

    def apply(self, change: Change) -> None:
        """Do what the system did."""
        if change.kind == "f":
            self._find(change.path).sync()
            return
        folder, name = self._place(change.path)
        if change.kind in "cm":
            folder.names[name] = Node(None if change.kind == "m" else bytearray())
        elif change.kind == "t":
            folder.names[name].data = bytearray()
        elif change.kind in "ws":
            data = folder.names[name].data
            assert data is not None
            end = change.offset + len(change.data)
            data.extend(bytes(max(0, end - len(data))))
            if change.kind == "w":
                data[change.offset : end] = change.data
            else:
                del data[change.offset :]
        elif change.kind in "du":
            del folder.names[name]
        else:
            other, new = self._place(change.second)
            if change.kind == "r":
                other.names[new] = folder.names.pop(name)
            elif change.kind == "l":
                other.names[new] = folder.names[name]
            else:
                other.names[new], folder.names[name] = folder.names[name], other.names[new]

    def after_power_loss(self, names: str, data: str) -> dict[str, bytes | None]:
        """Path → content of all that is there afterwards, None for a folder.

        Args:
            names: "synced": names are those of their folder's last fsync; "written": every change of a name has reached the disk.
            data: "synced": files hold what they held at their last fsync; "zeros": what came after it is there, as zeros; "written": all is there.
        """
        found: dict[str, bytes | None] = {}

        def visit(node: Node, path: str) -> None:
            for name, child in (node.synced_names if names == "synced" else node.names).items():
                here = f"{path}/{name}" if path else name
                if child.data is None:
                    found[here] = None
                    visit(child, here)
                else:
                    zeros = bytes(max(0, len(child.data) - len(child.synced_data))) if data == "zeros" else b""
                    found[here] = bytes(child.data) if data == "written" else child.synced_data + zeros

        visit(self._top, "")
        return found

    def _find(self, path: str) -> Node:
        node = self._top
        for part in Path(path).relative_to(self._root).parts:
            node = node.names[part]
        return node

    def _place(self, path: str) -> tuple[Node, str]:
        parent, name = os.path.split(path)
        return self._find(parent), name


def write_tree(tree: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder what `Disk.after_power_loss` says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """A folder as `Disk.after_power_loss` describes one."""
    return {path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}
