"""Numbers and verdicts that all processes share. Every function here is a collective that every rank must reach."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from tunelib.errors import DataError, SaveError, Stopped, TunelibError

T = TypeVar("T")


_OF_THREAD = threading.local()
SAVES = "saves"
"""What the group calls itself over which saves in the background speak: a step's time limit is not theirs."""


@contextlib.contextmanager
def speaking_over(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Have what this thread says in this block go over another group of all ranks, so that it does not mix with what other threads say."""
    _OF_THREAD.group = group
    try:
        yield
    finally:
        _OF_THREAD.group = None


def own_group() -> dist.ProcessGroup | None:
    """The group that this thread speaks over; None for that of all ranks."""
    return getattr(_OF_THREAD, "group", None)


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of a tensor over all ranks, or those of a group, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=own_group())
    return values


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=own_group())
    return values[0]


def agree(error: BaseException | None) -> None:
    """Raise on every rank what any rank met, so that none goes on alone and hangs; the lowest rank's error wins.

    A rank that met one itself raises its own, with its traceback; the others one of the same class, where it is one of ours.
    """
    problem = (
        (type(error), str(error))
        if isinstance(error, (TunelibError, Stopped))
        else None
        if error is None
        else (None, f"{type(error).__name__}: {error}")
    )
    met = gather_objects(problem)
    if error is not None:
        if isinstance(error, (TunelibError, Stopped)):
            error.agreed = True
        raise error
    for rank, problem in enumerate(met):
        if problem is not None:
            kind, text = problem
            elsewhere = (kind or TunelibError)(f"rank {rank}: {text}")
            elsewhere.agreed = True
            if kind is None:
                elsewhere.exit_code = 1
            raise elsewhere


def check_same(value: dict[str, Any], what: str) -> None:
    """Make sure that every rank has the same facts, such as what it read from its own disk. Collective.

    Raises:
        DataError: on every rank, naming what differs and where.
    """
    for rank, other in enumerate(gather_objects(value)):
        if different := [name for name in sorted({*value, *other}) if value.get(name) != other.get(name)]:
            error = DataError(f"{what} of rank {rank} is not that of the others: {', '.join(different)} differ; give every machine the same files")
            error.agreed = True
            raise error


@contextlib.contextmanager
def agreed(what: str = "") -> Iterator[None]:
    """Run a block without collectives on every rank; what any rank raises in it, all raise after it. Collective.

    Args:
        what: makes an OSError of the block a SaveError that begins with this, such as "step-10 cannot be written".
    """
    error: BaseException | None = None
    try:
        yield
    except OSError as problem:
        error = SaveError(f"{what}: {problem}") if what else problem
    except (Exception, Stopped) as problem:
        error = problem
    agree(error)


def on_main(act: Callable[[], T], what: str = "") -> T:
    """Have rank 0 alone do something; what it returned, or raised, reaches every rank. Collective.

    Args:
        what: see `agreed`.
    """
    done: list[T] = []
    with agreed(what):
        if not dist.is_initialized() or dist.get_rank() == 0:
            done.append(act())
    return from_main(done[0] if done else None)  # type: ignore[return-value]  # rank 0 always has one


def largest_of_ranks(value: float, device: torch.device) -> float:
    """The largest of what all ranks have. Collective."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each of some flags is set on any rank. Collective."""
    return [count > 0 for count in sum_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, pipeline: DeviceMesh | None = None) -> Tensor:
    """Scale all gradients down to an L2 norm of ``max_norm``; returns the norm before, a scalar.

    Parameters without a gradient are left out; the norm is over the whole parameters, wherever their shards are.

    Args:
        pipeline: the processes that have the model's other parameters.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if pipeline is not None:
        norm = sum_over_ranks(norm.double().square(), pipeline.get_group()).sqrt().to(norm.dtype)  # which the square may be beyond
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def deal(items: Sequence[T]) -> list[T]:
    """This rank's share of a list of work that all ranks know (no communication)."""
    if not dist.is_initialized():
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])
