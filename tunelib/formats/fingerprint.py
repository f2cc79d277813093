"""What tells frozen weights from others, whatever form they are stored in and whoever holds which part of them.

For each weight the float32 bits of every number times an odd number that follows from its column, modulo 2^32, summed over the row, times one
that follows from the row, summed modulo 2^64; so shares of ranks add up, whatever they are cut along. It is no proof against intent.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tunelib.formats.source import StoredModel
from tunelib.formats.tensors import blocks_of, bounds_of
from tunelib.parallel.reduce import gather_objects

BLOCK_ELEMENTS = 1 << 18  # stays in the processor's cache


def fingerprint_of(checksums: Mapping[str, int]) -> str:
    """What tells frozen weights from others, on any layout and in any form: a digest of the sums over all ranks. Collective."""
    total: dict[str, int] = {}
    for share in gather_objects(dict(checksums)):
        for name, value in share.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return hashlib.blake2b(json.dumps(sorted(total.items())).encode(), digest_size=16).hexdigest() if total else ""


def checksum_of(part: Tensor, bounds: list[tuple[int, int]]) -> int:
    """A part's share of the checksum of a weight, a vector or a matrix.

    Args:
        bounds: where the part lies in the tensor.
    """
    bounds = bounds if len(bounds) > 1 else [(0, 1), *bounds]
    (first, last), (left, right) = bounds
    rows, total = part.cpu().reshape(last - first, right - left), 0
    column_factors = 2 * torch.arange(left, right, dtype=torch.int32) + 1
    step = max(1, BLOCK_ELEMENTS // max(1, right - left))
    for begin in range(0, last - first, step):
        bits = rows[begin : begin + step].float().view(torch.int32)
        row_factors = 2 * torch.arange(first + begin, first + begin + len(bits)) + 1
        total += int(((bits * column_factors).sum(dim=1) * row_factors).sum())  # integers wrap around
    return total % 2**64


def fingerprint_stored(stored: StoredModel, names: Iterable[str]) -> str:
    """The fingerprint of weights as they lie in a checkpoint."""
    checksums = {}
    for name in names:
        shape = stored.weights[name].shape
        checksums[name] = sum(checksum_of(stored.read(name, part), bounds_of(part, shape)) for part in blocks_of(shape)) % 2**64
    return fingerprint_of(checksums)
