"""Rotary position embedding in Hugging Face's layout: a head's first half is rotated against its second half.

B batch, S sequence, H heads, D head dim.
"""

import math

import torch
from torch import Tensor

from tunelib.model.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair, (D/2,) float32.

    With Llama 3.1's scaling, rotations whose wavelength is longer than the original context / low_freq_factor are slowed by
    ``factor``, those shorter than original context / high_freq_factor are kept, those between are blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((context / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: kept, 0: slowed
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (B, S, 1, D), for (B, S) positions; computed in float32 and then cast.

    Nothing is kept in a buffer, so that a model made on the meta device has nothing to rebuild.
    """
    angles = positions.float()[..., None] * rope_frequencies(config, positions.device)  # (B, S, D/2)
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of ``x`` (B, S, H, D) by its position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
