"""How a layer attends: what differs between families and between layers, and attention by the formula.

B batch, n queries, T keys, H heads, K kv heads, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunelib.model.config import ModelConfig


@dataclass(frozen=True)
class AttentionForm:
    """How a layer attends: softmax(cap(q·k · scale)) over the keys that a query sees.

    Attributes:
        scale: None for 1 / sqrt(D).
        softcap: cap(x) = softcap · tanh(x / softcap); 0: cap(x) = x.
        window: a query sees so many tokens of its document, itself and those just before; 0: all before it.
    """

    scale: float | None = None
    softcap: float = 0.0
    window: int = 0

    def is_plain_for(self, length: int) -> bool:
        """Whether torch's own attention does the same to a document of so many tokens."""
        return not self.softcap and not 0 < self.window < length


PLAIN = AttentionForm()


def form_of(config: ModelConfig, number: int) -> AttentionForm:
    """How a layer attends, by its number."""
    return AttentionForm(config.attention_scale, config.attention_softcap, config.windows[number] if config.windows else 0)


def attend_to_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, form: AttentionForm) -> Tensor:
    """Attention of q (B, H, n, D) to those of the keys and values k, v (B, K, T, D) that are seen, → (B, H, n, D).

    Args:
        seen: (n, T) or (B, 1, n, T), True where a query sees a key, the window included. None, for a form that is plain for T tokens: the only query
            sees all of them, or, where T = n, each what is not later.
    """
    group = q.shape[1] // k.shape[1]
    if not form.softcap:
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None and q.shape[2] > 1, scale=form.scale, enable_gqa=group > 1)
    assert seen is not None
    k, v = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if form.scale is None else form.scale)
    scores = (form.softcap * torch.tanh(scores / form.softcap)).masked_fill(~seen, -torch.inf)
    shares = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return shares @ v
