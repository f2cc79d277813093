"""The norm of all families."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelib.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the division in float32 or better (Zhang and Sennrich 2019).

    Args:
        offset: what is added to the weight.
        casts_last: multiply before the result is cast to the type of x, not after.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, casts_last: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset, self.casts_last = eps, offset, casts_last

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = F.rms_norm(precise, (x.shape[-1],), eps=self.eps)
        if not self.casts_last:
            return self.weight * normal.to(x.dtype)
        weight = self.weight.to(precise.dtype)
        return (normal * (weight + self.offset if self.offset else weight)).to(x.dtype)


def build_norm(config: ModelConfig, size: int) -> RMSNorm:
    """A norm over ``size`` numbers, as the family has it."""
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset, config.norm_casts_last or bool(config.norm_offset))
