"""NF4: frozen weights in four bits (Dettmers et al. 2023, "QLoRA", section 3 and appendix E).

A row is divided into blocks of 64 numbers. Each is divided by the largest magnitude of its block and becomes one of 16 levels, which
are quantiles of the normal distribution. A quantised matrix is one of bytes, (out, in / 2 + in / 16): two levels to a byte, then the
blocks' magnitudes in float32. So its rows stay whole, shard like those of any other matrix, and no cast of the types touches them.
What it gives up: the second quantisation of the magnitudes, which would save 0.37 bits more per number.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
# Dettmers et al. 2023, appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def packed_columns(in_features: int) -> int:
    """Bytes of a row."""
    return in_features // 2 + in_features // BLOCK * 4


def quantize(weight: Tensor) -> Tensor:
    """(out, in) → bytes (out, in / 2 + in / 16); ``in`` is a multiple of 64."""
    out_features, in_features = weight.shape
    assert in_features % BLOCK == 0, in_features
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    blocks = weight.float().reshape(out_features, in_features // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=2)  # (out, in / 64)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8).view(out_features, in_features)
    return torch.cat([codes[:, ::2] * 16 + codes[:, 1::2], largest.contiguous().view(torch.uint8)], dim=1)


def dequantize(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, but for what four bits cannot hold: (out, in)."""
    out_features, columns = packed.shape
    in_features = columns * 16 // 9
    codes, largest = packed[:, : in_features // 2], packed[:, in_features // 2 :].contiguous().view(torch.float32)  # (out, in / 2), (out, in / 64)
    blocks = F.embedding(codes.int(), _level_pairs(packed.device)).view(out_features, in_features // BLOCK, BLOCK)
    return blocks.mul_(largest[..., None]).view(out_features, in_features).to(dtype)


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """(256, 2): the two levels of each byte."""
    return torch.cartesian_prod(*[torch.tensor(LEVELS, device=device)] * 2)


def forget_levels() -> None:
    """Let go of what is kept between calls, where it may have been made of tensors without numbers."""
    _level_pairs.cache_clear()


class _LinearNf4(torch.autograd.Function):
    """x Wᵀ with W in NF4: neither pass keeps W in full."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        return F.linear(x, dequantize(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantize(ctx.saved_tensors[0], grad.dtype), None, None


def linear_nf4(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times a quantised matrix, plus a frozen bias (out,), → (…, out)."""
    return _LinearNf4.apply(x, packed, bias)
