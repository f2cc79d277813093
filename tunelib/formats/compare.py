"""Is a checkpoint whole, and do two of them hold the same weights, whatever their forms?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tunelib import files
from tunelib.errors import CheckpointError, FormatError
from tunelib.formats.source import StoredModel, check_model, expected_shapes
from tunelib.formats.tensors import Where
from tunelib.model.config import ModelConfig

BLOCK_ELEMENTS = 1 << 24
NOT_COMPUTED = ("max_position_embeddings", "initializer_range")
"""What does not change the logits of a text; Meta's params.json has no key for it."""


def find_faults(stored: StoredModel, looked_at: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is wrong with a checkpoint, a sentence each: files against the manifest, tensors against the config, numbers that are not finite.

    Args:
        looked_at: called with the number of bytes after each tensor.
    """
    faults: list[str] = []
    try:
        if (stored.folder / files.MANIFEST).is_file():
            entries = files.read_manifest(stored.folder)["files"]
            faults += files.find_damage(stored.folder, entries, sorted(entries))
        check_model(stored)
    except (CheckpointError, FormatError) as error:
        faults.append(str(error))
    for name, tensor in stored.tensors.items():
        try:
            num_bad = sum(int((~torch.isfinite(tensor.read(part))).sum()) for part in blocks_of(tensor.info.shape))
        except FormatError as error:
            faults.append(str(error))
            continue
        if num_bad:
            faults.append(f"{stored.path}: {name}: {num_bad} of {torch.Size(tensor.info.shape).numel()} numbers are not finite")
        looked_at(tensor.info.nbytes)
    return faults


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        first: the first difference, a sentence; empty where there is none.
        only_rounded: whether all that differs is the type, the values of one being those of the other rounded to it.
    """

    first: str = ""
    only_rounded: bool = False


def find_difference(one: StoredModel, other: StoredModel, looked_at: Callable[[int], None] = lambda _: None) -> Difference:
    """Compare two checkpoints of any forms, weight by weight, and what their configs say of the computation."""
    if fields := different_fields(one.config, other.config, exempt=NOT_COMPUTED):
        return Difference(f"the configs differ: {'; '.join(fields)}")
    rounded = ""
    for name in expected_shapes(one.config):
        infos = [model.weights.get(name) for model in (one, other)]
        for model, info in zip((one, other), infos, strict=True):
            if info is None:
                return Difference(f"{name} is missing in {model.path}")
        first, second = infos
        assert first is not None
        assert second is not None
        if first.shape != second.shape:
            return Difference(f"{name} has shape {list(first.shape)} in {one.path} and {list(second.shape)} in {other.path}")
        narrow = min((first.dtype, second.dtype), key=lambda dtype: (dtype.itemsize, str(dtype)))
        for part in blocks_of(first.shape):
            left, right = one.read(name, part), other.read(name, part)
            if not same_values(left.to(narrow), right.to(narrow)):
                differs = (left.to(narrow) != right.to(narrow)) & ~(left.isnan() & right.isnan())
                place = [inner + begin.start for inner, begin in zip(differs.nonzero()[0].tolist(), part, strict=True)]
                distance = (left.double() - right.double())[differs].abs().max().item()
                return Difference(f"{name} differs, first at {place}, near there by up to {distance:.3g}")
        if first.dtype != second.dtype and not rounded:
            rounded = f"{name} is {name_of(first.dtype)} in {one.path} and {name_of(second.dtype)} in {other.path}"
        looked_at(first.nbytes + second.nbytes)
    return Difference(f"{rounded}; every value is the same once rounded", only_rounded=True) if rounded else Difference()


def different_fields(one: ModelConfig, other: ModelConfig, exempt: tuple[str, ...] = ()) -> list[str]:
    """What two configs say differently of the computation, a few words each."""
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in vars(one) if name not in exempt)
    return [f"{name} is {left} and {right}" for name, left, right in pairs if left != right]


def blocks_of(shape: tuple[int, ...]) -> Iterator[Where]:
    """A tensor in blocks of whole rows."""
    if not shape:
        yield ()
        return
    row = max(1, torch.Size(shape[1:]).numel())
    step = max(1, BLOCK_ELEMENTS // row)
    for first in range(0, shape[0], step):
        yield (slice(first, min(first + step, shape[0])), *(slice(0, size) for size in shape[1:]))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal, but for the sign of zero and the kind of NaN."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def name_of(dtype: torch.dtype) -> str:
    """The name of a type as configs write it."""
    return str(dtype).removeprefix("torch.")
