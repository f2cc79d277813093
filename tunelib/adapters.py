"""LoRA, rsLoRA and DoRA: small trained matrices beside frozen linear layers.

y = W x + s · B A x, where W is frozen, A is (rank, in), B is (out, rank) and s = alpha / rank (Hu et al. 2021, section 4.1), or
alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023). DoRA scales each row of W + s · B A to a trained length (Liu et al. 2024, section 4).
B begins as zeros, so that a model begins as its base.
"""

import difflib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelib.config.schema import Lora
from tunelib.errors import ConfigError
from tunelib.model.decoder import Decoder, generator_of
from tunelib.quantize import BLOCK, dequantize, linear_nf4, packed_columns

ALL_LINEAR = "all-linear"
MARKS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
"""How the names of an adapter's parameters end."""


class AdaptedLinear(nn.Linear):
    """A frozen linear layer, in its own type or in NF4, with an adapter beside it. Its weight keeps its name."""

    def __init__(self, in_features: int, out_features: int, bias: bool, section: Lora):
        super().__init__(in_features, out_features, bias)
        self.rank, self.dropout = section.rank, section.dropout
        self.scaling = section.alpha / (math.sqrt(section.rank) if section.use_rslora else section.rank)
        self.lora_A = nn.Linear(in_features, section.rank, bias=False)
        self.lora_B = nn.Linear(section.rank, out_features, bias=False)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features)) if section.use_dora else None

    @property
    def is_quantized(self) -> bool:
        """Whether the base is in NF4."""
        return self.weight.dtype == torch.uint8

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        base = linear_nf4(x, self.weight) if self.is_quantized else F.linear(x, self.weight)
        update = self.lora_B(self.lora_A(dropped)) * self.scaling
        if self.lora_magnitude_vector is None:
            result = base + update
        else:
            scale = self.lora_magnitude_vector / self._row_lengths()
            inner = base if dropped is x else linear_nf4(dropped, self.weight) if self.is_quantized else F.linear(dropped, self.weight)
            result = base + (scale - 1) * inner + scale * update
        return result if self.bias is None else result + self.bias

    @torch.no_grad()  # a length is taken as a constant (Liu et al. 2024, section 4.3)
    def _row_lengths(self) -> Tensor:
        """The length of each row of W + s · B A, (out,), without making that sum: |w + u|² = |w|² + 2 w·u + |u|², worked out in float32 or better.

        With B = 0 it is |w| bit for bit.
        """
        weight = dequantize(self.weight, self.lora_A.weight.dtype) if self.is_quantized else self.weight
        low, high = self.lora_A.weight, self.lora_B.weight
        precise = torch.promote_types(low.dtype, torch.float32)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=precise)
        high = high.to(precise) * self.scaling  # (out, rank)
        across = (F.linear(weight, low).to(precise) * high).sum(dim=1)  # w·u
        added = ((high @ (low @ low.T).to(precise)) * high).sum(dim=1)  # |u|²
        return (own * (1 + (2 * across + added) / own.square()).clamp(min=0).sqrt()).to(low.dtype)


def add_adapters(model: Decoder, section: Lora) -> None:
    """Freeze a model on the meta device, and put adapters beside the linear layers that are asked for.

    Raises:
        ConfigError: a name that no linear layer has, or a layer that NF4 cannot hold.
    """
    linear = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear if section.target_modules == (ALL_LINEAR,) else set(section.target_modules)
    for name in sorted(wanted - linear):
        near = difflib.get_close_matches(name, [*linear, ALL_LINEAR], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(linear))}, or {ALL_LINEAR!r} alone"
        raise ConfigError(f"lora.target_modules: no linear layer is called {name!r}; {hint}")
    model.requires_grad_(False)
    dtype = model.model.embed_tokens.weight.dtype
    for parent in list(model.model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and not isinstance(parent, AdaptedLinear) and name in wanted:
                setattr(parent, name, _adapt(module, name, section, dtype))
    model.model.embed_tokens.requires_grad_(section.train_embeddings)
    if section.train_lm_head:
        model.lm_head.requires_grad_(True)


def _adapt(linear: nn.Linear, name: str, section: Lora, dtype: torch.dtype) -> AdaptedLinear:
    with torch.device("meta"):
        adapted = AdaptedLinear(linear.in_features, linear.out_features, linear.bias is not None, section).to(dtype)
        if section.quantize_base == "nf4":
            if linear.in_features % BLOCK:
                raise ConfigError(f'lora.quantize_base = "nf4": {name} has {linear.in_features} inputs, which are not a multiple of {BLOCK}')
            packed = torch.empty(linear.out_features, packed_columns(linear.in_features), dtype=torch.uint8)
            adapted.weight = nn.Parameter(packed, requires_grad=False)
    adapted.weight.requires_grad_(False)
    if adapted.bias is not None:
        adapted.bias.requires_grad_(False)
    return adapted


def is_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(MARKS)


def draw_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A fresh A or B as the full float32 tensor on the CPU, a function of (seed, name): A as Kaiming's uniform with a = sqrt(5), B zeros."""
    if name.endswith(".lora_B.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(seed, name))


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """W + s · B A, for DoRA with rows of the trained lengths; a new tensor (out, in), worked out in float32 or better.

    Args:
        weight: (out, in), or some of its rows together with those of ``lora_b`` and ``magnitude``.
    """
    precise = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(precise) + scaling * (lora_b.to(precise) @ lora_a.to(precise))
    return merged if magnitude is None else merged * (magnitude.to(precise) / merged.norm(dim=1))[:, None]
