"""How tensors get into a DCP folder, in the foreground and in the background."""

import concurrent.futures
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from tunelib.checkpoint.dcp_reader import find_stop, on_this_process_alone, root_cause
from tunelib.errors import SaveError
from tunelib.parallel.reduce import SAVES, agree, own_group, speaking_over


class Writer(dcp.FileSystemWriter):
    """torch's writer, which says what the system said: torch.save in it hides that behind an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's files."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as problem:
            raise problem.__context__ if isinstance(problem.__context__, OSError) else problem from None


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as a DCP folder. Collective; raises SaveError on every rank."""
    error: BaseException | None = None
    try:
        with on_this_process_alone() as alone:
            dcp.save(tensors, storage_writer=Writer(folder), no_dist=alone, process_group=own_group())
    except (Exception, CheckpointException) as problem:
        error = find_stop(problem) or SaveError(f"{folder} cannot be written: {root_cause(problem)}")
    agree(error)


class Background:
    """Saves in a thread of its own, which speaks over a group of its own, from a copy of the tensors in the main memory.

    Args:
        pinned: copy into memory that a GPU writes to directly.
    """

    def __init__(self, pinned: bool):
        self._group = dist.new_group(backend="gloo", group_desc=SAVES) if dist.is_initialized() else None
        options = StagingOptions(use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned)
        self._stager = DefaultStager(options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: concurrent.futures.Future | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something was begun that `finish` has not waited for."""
        return self._pending is not None

    def start(self, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor]], object]) -> None:
        """Copy the tensors, and begin to write the copies; after `finish`, since the copies have one place."""
        copies = self._stager.stage(tensors)
        assert isinstance(copies, dict)

        def run() -> object:
            with speaking_over(self._group):
                return write(copies)

        self._pending = self._thread.submit(run)

    def finish(self) -> None:
        """Wait for what was begun, and raise what it raised, which is the same on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
