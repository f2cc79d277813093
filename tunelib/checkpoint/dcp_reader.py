"""The one safe reader of DCP folders: nothing in them can run code.

torch reads a folder's ``.metadata`` with pickle, and values that are not tensors with ``torch.load(weights_only=False)``; either
may hold any program. Here the first goes through an allow-list, and the second are refused: nothing of ours is one.
"""

import contextlib
import io
import math
import pickle
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from tunelib.errors import CheckpointError, Stopped
from tunelib.files import lies_inside
from tunelib.parallel.reduce import agree

_REMARKS = threading.Lock()
_DCP = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_DCP, name) for name in ("Metadata", "MetadataIndex", "BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata")),
    *((_DCP, name) for name in ("StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")),
}


class _AllowListUnpickler(pickle._Unpickler):
    """The one in Python, a third as fast: that in C makes room for whatever place in its memo a file names, 16 GiB in ten bytes."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a checkpoint has no need of")


class SafeReader(FileSystemReader):
    """torch's reader of DCP folders, with metadata unpickled by the allow-list."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata.

        Raises:
            CheckpointError: it is missing, damaged, or asks for code to be run.
        """
        path = self.folder / ".metadata"
        try:
            metadata = _AllowListUnpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {self.folder} is not a DCP checkpoint") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} does not hold checkpoint metadata")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path or not lies_inside(place.relative_path):
                raise CheckpointError(f"{path} names {place.relative_path!r}, which lies outside the folder")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """The part of a file that a tensor is in; torch would unpack a compressed one, however large it becomes."""
        with zipfile.ZipFile(io.BufferedReader(Window(file, sinfo.offset, sinfo.length))) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{self.folder / sinfo.relative_path} holds a compressed tensor; DCP writes none")
        return super()._slice_file(file, sinfo)


class Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.RawIOBase | io.BufferedReader, start: int, length: int):
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the base class allows any buffer
        self._file.seek(self._start + self._place)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._place)]) or 0
        self._place += count
        return count


class SafePlanner(DefaultLoadPlanner):
    """torch's load planner for tensors alone: values that are not tensors would be unpickled."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Refuse a tensor of which a part lies nowhere: torch would leave it as it was."""
        assert metadata is not None, "SafeReader gives it"
        for name in state_dict:
            entry = metadata.state_dict_metadata.get(name)
            if isinstance(entry, TensorStorageMetadata) and sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
                raise CheckpointError(f".metadata does not say where all of {name} lies")
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse what is not a tensor."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor")


def load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, sharded ones too, from a DCP folder written on any layout. Collective.

    Raises:
        CheckpointError: on every rank: a tensor is missing, has another shape, or its file cannot be read.
    """
    error: BaseException | None = None
    try:
        reader, planner = SafeReader(folder), SafePlanner(allow_partial_load=False)
        with on_this_process_alone() as alone:
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=alone)
    except (Exception, CheckpointException) as problem:
        is_ours = isinstance(problem, CheckpointError)
        error = find_stop(problem) or (problem if is_ours else CheckpointError(f"{folder} cannot be loaded: {root_cause(problem)}"))
    agree(error)


@contextlib.contextmanager
def on_this_process_alone() -> Iterator[bool]:
    """Whether there is no process group, which torch otherwise remarks on at every load and save.

    What is ignored is the process's, not the thread's: of two loads at a time, the first to end would have the other's remark heard.
    """
    if dist.is_initialized():
        yield False
        return
    with _REMARKS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield True


def find_stop(problem: BaseException) -> Stopped | None:
    """A signal's, which DCP wraps as it does any error."""
    causes = [cause for cause, _ in getattr(problem, "failures", {}).values()]
    return next((cause for cause in causes if isinstance(cause, Stopped)), None)


def root_cause(problem: BaseException) -> str:
    """DCP wraps each rank's error; the first of them says what happened."""
    failures = getattr(problem, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(sorted(failures.items())))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(problem).__name__}: {problem}"
