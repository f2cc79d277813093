"""What the model is fed: a micro-batch of packed rows.

B rows of S tokens. A row of three documents and padding, with S = 8:

    tokens        a0 a1 a2  b0 b1  c0  ·  ·
    labels        a1 a2 a3  -  b2  c1  -  -     shifted already; "-" is IGNORED, a token that is not trained
    positions      0  1  2   0  1   0   0  1
    document       3 long   2 long  1   2 (padding is a document of its own)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``document_lengths`` cuts the B x S tokens, row after row, into documents, padding included."""

    tokens: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64
    positions: Tensor  # (B, S) int64
    document_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "positions")}
        return Batch(**move, document_lengths=self.document_lengths)

    def widened(self, width: int) -> "Batch":
        """The same rows, ``width`` long; what is added to each is a document of its own."""
        padding = width - self.tokens.shape[1]
        positions = torch.cat((self.positions, torch.arange(padding, device=self.positions.device).expand(len(self.positions), -1)), dim=1)
        tokens, labels = F.pad(self.tokens, (0, padding)), F.pad(self.labels, (0, padding), value=IGNORED)
        return Batch(tokens, labels, positions, pad_documents(self.document_lengths, self.tokens.shape[1], padding))


def pad_documents(lengths: tuple[int, ...], width: int, padding: int) -> tuple[int, ...]:
    """The lengths of documents, row after row, where each row of ``width`` gets ``padding`` more, as a document of its own."""
    if not padding:
        return lengths
    padded, place = [], 0
    for length in lengths:
        padded.append(length)
        place += length
        if place % width == 0:
            padded.append(padding)
    return tuple(padded)
