"""What tells frozen weights from others, whatever form they are stored in and whoever holds which part of them.

For each weight the sum, modulo 2^64, of every number's float32 bits times an odd number that follows from its place in the whole
tensor; so shares of ranks add up. It is no proof against intent.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tunelib.formats.source import StoredModel
from tunelib.formats.tensors import blocks_of, bounds_of
from tunelib.parallel.reduce import gather_objects

CHECKSUM_BLOCK = 1 << 22


def fingerprint_of(checksums: Mapping[str, int]) -> str:
    """What tells frozen weights from others, on any layout and in any form: a digest of the sums over all ranks. Collective."""
    total: dict[str, int] = {}
    for share in gather_objects(dict(checksums)):
        for name, value in share.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return hashlib.blake2b(json.dumps(sorted(total.items())).encode(), digest_size=16).hexdigest() if total else ""


def checksum_of(part: Tensor, bounds: list[tuple[int, int]], shape: torch.Size) -> int:
    """A part's share of the checksum of a weight.

    Args:
        bounds: where the part, of whole rows, lies in a tensor of this shape.
    """
    columns = shape[1:].numel()
    first = bounds[0][0] * columns
    flat, total = part.reshape(-1), 0
    for begin in range(0, flat.numel(), CHECKSUM_BLOCK):
        bits = flat[begin : begin + CHECKSUM_BLOCK].float().view(torch.int32).to(torch.int64)
        place = torch.arange(first + begin, first + begin + bits.numel())
        total += int((bits * (2 * place + 1)).sum())  # integers wrap around
    return total % 2**64


def fingerprint_stored(stored: StoredModel, names: Iterable[str]) -> str:
    """The fingerprint of weights as they lie in a checkpoint."""
    checksums = {}
    for name in names:
        shape = torch.Size(stored.weights[name].shape)
        parts = (checksum_of(stored.read(name, part), bounds_of(part, tuple(shape)), shape) for part in blocks_of(tuple(shape)))
        checksums[name] = sum(parts) % 2**64
    return fingerprint_of(checksums)
