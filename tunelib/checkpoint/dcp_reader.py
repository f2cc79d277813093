"""The one safe reader of DCP folders: nothing in them can run code.

torch reads a folder's ``.metadata`` with pickle, and values that are not tensors with ``torch.load(weights_only=False)``; either
may hold any program. Here the first goes through an allow-list, and the second are refused: nothing of ours is one.
"""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from tunelib.errors import CheckpointError
from tunelib.parallel.reduce import agree

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


class _AllowListUnpickler(pickle.Unpickler):
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
            if Path(place.relative_path).name != place.relative_path:
                raise CheckpointError(f"{path} names {place.relative_path!r}, which lies outside the folder")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """torch's load planner for tensors alone: values that are not tensors would be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse what is not a tensor."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is not a tensor")


def load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, sharded ones too, from a DCP folder written on any layout. Collective.

    Raises:
        CheckpointError: on every rank: a tensor is missing, has another shape, or its file cannot be read.
    """
    error = None
    try:
        reader, planner = SafeReader(folder), SafePlanner(allow_partial_load=False)
        with on_this_process_alone() as alone:
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=alone)
    except (Exception, CheckpointException) as problem:
        error = problem if isinstance(problem, CheckpointError) else CheckpointError(f"{folder} cannot be loaded: {root_cause(problem)}")
    agree(error)


@contextlib.contextmanager
def on_this_process_alone() -> Iterator[bool]:
    """Whether there is no process group, which torch otherwise remarks on at every load and save."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield not dist.is_initialized()


def root_cause(problem: BaseException) -> str:
    """DCP wraps each rank's error; the first of them says what happened."""
    failures = getattr(problem, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(sorted(failures.items())))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(problem).__name__}: {problem}"
