"""Write a model in any form: under a staging name, tensor by tensor, and final only when all of it is on the disk."""

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tunelib import files
from tunelib.errors import FormatError
from tunelib.formats.dcp import DcpWriter, dcp_metadata
from tunelib.formats.form import Entry
from tunelib.formats.found import DCP_METADATA
from tunelib.formats.plan import Plan
from tunelib.formats.safetensors_file import SafetensorsWriter
from tunelib.formats.tensors import Untouched, Where, name_of, to_pairs
from tunelib.formats.torch_file import TorchWriter
from tunelib.parallel.reduce import agreed

KIND = "export"
"""What the manifest says a folder is that holds weights for others."""


class TensorWriter(Protocol):
    """Writes one file, tensor after tensor in the order that it was told."""

    def write(self, tensor: Tensor | Untouched) -> None: ...
    def finish(self) -> dict[str, int]: ...


def write_checkpoint(
    plan: Plan,
    read: Callable[[str, Where], Tensor | Untouched],
    target: Path,
    is_main: bool = True,
    wrote: Callable[[int], None] = lambda _: None,
    check: Callable[[Path], dict[str, object]] | None = None,
    single_file: str = "",
    replace: bool = True,
) -> dict[str, object]:
    """Write a folder. Collective: all ranks read, rank 0 writes; one tensor is held at a time.

    Args:
        read: gives a weight in Hugging Face's layout, or its part; called on every rank in the same order.
        wrote: called with the number of bytes after each tensor.
        single_file: the name of the only file to keep, where the target is a file.
        replace: whether an older folder that an export wrote may be exchanged; else the name must be free, or that of an empty folder.
        check: looks at the finished folder before it gets its name; called on every rank. What it raises leaves no folder.

    Returns:
        What ``check`` found.

    Raises:
        SaveError: on every rank; an older folder of that name stays as it was.
    """
    staging = files.staging_of(target)
    failed = f"{target} cannot be written"
    with agreed(failed):
        if is_main:
            files.make_staging(target)
    try:
        described: dict[str, dict[str, int]] = {}
        dcp_writers: list[DcpWriter] = []
        for together in _group(plan.form.files):
            with contextlib.ExitStack() as stack:
                writers: dict[str, TensorWriter] = {}
                with agreed(failed):
                    if is_main:
                        for file, entries in together.items():
                            writers[file] = _open_writer(stack.enter_context(files.ChecksummedFile(staging / file)), file, entries)
                dcp_writers += [writer for writer in writers.values() if isinstance(writer, DcpWriter)]
                _write_entries(together, writers, read, wrote, failed)
                with agreed(failed):
                    described |= {file: writer.finish() for file, writer in writers.items()}
        with agreed(failed):
            if is_main:
                if dcp_writers:
                    files.write_file(staging / DCP_METADATA, dcp_metadata(dcp_writers))
                if not single_file:
                    _write_companions(plan, staging)
                others = [name for name in files.list_files(staging) if name not in described]
                described |= files.describe_files(staging, others)
        found = check(staging) if check is not None else {}
        with agreed(failed):
            if is_main:
                commit(staging, target, described, single_file, replace)
    finally:
        with contextlib.suppress(OSError):  # what was raised says more
            if is_main:
                files.remove_folder(staging)
    return found


def _group(partition: dict[str, list[Entry]]) -> list[dict[str, list[Entry]]]:
    """Files that are written at the same time: those that hold parts of the same tensors, each of which is then read once."""
    has_parts = any(entry.where for entries in partition.values() for entry in entries)
    return [partition] if has_parts else [{file: entries} for file, entries in partition.items()]


def _write_entries(
    partition: dict[str, list[Entry]],
    writers: dict[str, TensorWriter],
    read: Callable[[str, Where], Tensor | Untouched],
    wrote: Callable[[int], None],
    failed: str,
) -> None:
    """Read every tensor of some files on all ranks, the first of each file, then the second; and write it on the one that has writers. Collective."""
    for row in itertools.zip_longest(*([(file, entry) for entry in entries] for file, entries in partition.items())):
        for file, entry in (found for found in row if found is not None):
            tensor = read(entry.source, entry.where)
            with agreed(failed):
                if writers:
                    writers[file].write(_as_stored(tensor, entry))
                    wrote(entry.info.nbytes)


def commit(staging: Path, target: Path, described: dict[str, dict[str, int]], single_file: str, replace: bool) -> None:
    """Make what was staged final: a folder, or the only file of it that is wanted. Raises OSError where it may not replace what is there."""
    if single_file:
        files.commit_file(staging / single_file, target)
        return
    if not replace and target.exists():
        target.rmdir()  # if it is empty
    files.commit_folder(staging, target, described, kind=KIND)


def _as_stored(tensor: Tensor | Untouched, entry: Entry) -> Tensor | Untouched:
    if isinstance(tensor, Untouched):
        return tensor
    stored = tensor.to(entry.info.dtype)
    if entry.info.dtype != tensor.dtype and not stored.isfinite().all() and tensor.isfinite().all():
        raise FormatError(f"{entry.source} holds {tensor.abs().max().item():.4g}, which {name_of(entry.info.dtype)} cannot: choose another type")
    return to_pairs(stored, entry.head_dim) if entry.head_dim else stored


def _open_writer(file: files.ChecksummedFile, name: str, entries: list[Entry]) -> TensorWriter:
    infos = [entry.info for entry in entries]
    if name.endswith(".distcp"):
        return DcpWriter(file, name, infos)
    return SafetensorsWriter(file, infos) if name.endswith(".safetensors") else TorchWriter(file, infos)


def _write_companions(plan: Plan, staging: Path) -> None:
    for name, content in plan.companions.items():
        files.write_file(staging / name, content)


def to_json(content: object) -> str:
    """JSON as the files beside weights hold it."""
    return json.dumps(content, indent=2) + "\n"
