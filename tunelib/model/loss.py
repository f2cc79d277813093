"""The loss: a sum over trained tokens, never a mean, so that any split of a batch adds up to the same number (law 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelib.batch import IGNORED


def summed_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Cross-entropy in nats, summed over the trained tokens of a micro-batch, in float32 or better; 0 where there is none.

    Args:
        hidden: (B, S, hidden) after the last norm.
        labels: (B, S), IGNORED where a token is not trained.
        head: maps (T, hidden) to (T, V) logits; called with the T trained positions only.
    """
    trained = labels != IGNORED
    logits = head(hidden[trained])  # (T, V)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(precise), labels[trained], reduction="sum")
