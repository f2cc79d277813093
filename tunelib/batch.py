"""What the model is fed: a micro-batch of packed rows.

B rows of S tokens. A row of three documents and padding, with S = 8:

    tokens        a0 a1 a2  b0 b1  c0  ·  ·
    labels        a1 a2 a3  -  b2  c1  -  -     shifted already; "-" is IGNORED, a token that is not trained
    positions      0  1  2   0  1   0   0  1
    document       3 long   2 long  1   2 (padding is a document of its own)
"""

from dataclasses import dataclass

import torch
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
