"""Context parallelism: every row cut over several processes, each of which computes the queries of its part against all keys and values.

A row is cut into 2n chunks; process i of n works on chunks i and 2n − 1 − i, so that all have the same share of causal attention. Keys
and values are gathered by a collective whose backward pass sums what each process found for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tunelib.batch import IGNORED
from tunelib.model.attention import Segment, Segments

# The names since torch 2.13, and those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class ContextShare:
    """One process's part of every row.

    Attributes:
        mesh: the processes that share rows.
        unit: what the length of a part must divide by.
    """

    mesh: DeviceMesh
    unit: int = 1

    def __call__(self, tokens: Tensor, positions: Tensor, labels: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Segments]:
        """(B, S) of whole rows → (B, S' / n) of this process's part, and what attention needs to know of it.

        Args:
            lengths: of the documents, row after row. S' is S rounded up to whole chunks.
        """
        rows, width = tokens.shape
        padding = -width % (2 * self.mesh.size() * self.unit)
        segments = Segments(tuple(self._cut(lengths, rows, width, width + padding)), self._gather)
        return self._take(tokens, padding, 0), self._take(positions, padding, 0), self._take(labels, padding, IGNORED), segments

    @property
    def _chunks(self) -> tuple[int, int]:
        rank = self.mesh.get_local_rank()
        return rank, 2 * self.mesh.size() - 1 - rank

    def _take(self, whole: Tensor, padding: int, fill: int) -> Tensor:
        chunks = F.pad(whole, (0, padding), value=fill).chunk(2 * self.mesh.size(), dim=1)
        return torch.cat([chunks[number] for number in self._chunks], dim=1)

    def _cut(self, document_lengths: tuple[int, ...], rows: int, width: int, padded: int) -> Iterator[Segment]:
        """This process's runs of queries, row by row and chunk by chunk, each inside one document."""
        size = padded // (2 * self.mesh.size())
        bounds = [(number * size, (number + 1) * size) for number in self._chunks]
        by_row: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        begin = 0
        for length in document_lengths:
            by_row[begin // width].append((begin % width, begin % width + length))
            begin += length
        for row, documents in enumerate(by_row):
            documents = [*documents, (width, padded)] if padded > width else documents
            for low, high in bounds:
                for first, last in documents:
                    if max(first, low) < min(last, high):
                        yield Segment(row * padded + first, max(first, low) - first, min(last, high) - first)

    def _gather(self, part: Tensor) -> Tensor:
        """(B, S' / n, …) of every process → (B, S', …) in the order of the row."""
        parts = _Gather.apply(part.contiguous(), self.mesh.get_group())  # (n B, S' / n, …)
        chunks = [chunk for of_process in parts.split(len(part)) for chunk in of_process.chunk(2, dim=1)]  # 0, 2n − 1, 1, 2n − 2, …
        return torch.cat([*chunks[::2], *reversed(chunks[1::2])], dim=1)


class _Gather(torch.autograd.Function):
    """Every process's part, one after the other in the first dimension; backward, the sum of what all found for this process's."""

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty((group.size() * len(part), *part.shape[1:]))
        _all_gather(whole, part, group=group)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        _reduce_scatter(part, grad.contiguous(), group=ctx.group)
        return part, None
