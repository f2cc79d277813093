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
LORA_A, LORA_B, MAGNITUDE = MARKS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
"""How the names of an adapter's parameters end."""
TRAINED_IN_FULL = {"lm_head": "train_lm_head", "embed_tokens": "train_embeddings"}
"""What gets no adapter, and the setting that trains it."""


class AdaptedLinear(nn.Linear):
    """A frozen linear layer, in its own type or in NF4, with an adapter beside it, in float32 or better. Its weight keeps its name."""

    def __init__(self, in_features: int, out_features: int, bias: bool, section: Lora):
        super().__init__(in_features, out_features, bias)
        self.dropout = section.dropout
        self.scaling = scaling_of(section.rank, section.alpha, section.use_rslora)
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
        base = self._linear(x, self.bias)
        update = F.linear(F.linear(dropped, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype)) * self.scaling
        if self.lora_magnitude_vector is None:
            return base + update
        scale = self.lora_magnitude_vector / self._row_lengths(x.dtype).to(self.lora_magnitude_vector.dtype)
        inner = self._linear(dropped, None) if dropped is not x else base if self.bias is None else base - self.bias
        return base + (scale - 1).to(x.dtype) * inner + scale.to(x.dtype) * update

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear_nf4(x, self.weight, bias) if self.is_quantized else F.linear(x, self.weight, bias)

    @torch.no_grad()  # a length is taken as a constant (Liu et al. 2024, section 4.3)
    def _row_lengths(self, dtype: torch.dtype) -> Tensor:
        """The length of each row of W + s · B A, (out,), without making that sum: |w + u|² = |w|² + 2 w·u + |u|².

        With B = 0 it is that of `row_lengths`, bit for bit.

        Args:
            dtype: that layers compute in.
        """
        weight = dequantize(self.weight, dtype) if self.is_quantized else self.weight
        own = row_lengths(weight)
        low = self.lora_A.weight.to(own.dtype)
        high = self.lora_B.weight.to(own.dtype) * self.scaling  # (out, rank)
        across = (F.linear(weight, low.to(dtype)).to(own.dtype) * high).sum(dim=1)  # w·u
        added = ((high @ (low @ low.T)) * high).sum(dim=1)  # |u|²
        lengths = own * (1 + (2 * across + added) / own.square()).clamp(min=0).sqrt()
        return torch.where(own > 0, lengths, added.sqrt()).clamp(min=torch.finfo(own.dtype).tiny)


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """What B A is multiplied with."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def row_lengths(weight: Tensor) -> Tensor:
    """(out, in) → (out,), in float32 or better: what DoRA's magnitudes begin as."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


def add_adapters(model: Decoder, section: Lora) -> None:
    """Freeze a model on the meta device, and put adapters beside the linear layers that are asked for.

    Raises:
        ConfigError: a name that no linear layer has, or a layer that NF4 cannot hold.
    """
    linear = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear if section.target_modules == (ALL_LINEAR,) else set(section.target_modules)
    for name in sorted(wanted - linear):
        if name == ALL_LINEAR:
            raise ConfigError(f"lora.target_modules: {ALL_LINEAR!r} stands alone, as it means all of {', '.join(sorted(linear))}")
        if name in TRAINED_IN_FULL:
            raise ConfigError(f"lora.target_modules: {name!r} gets no adapter; lora.{TRAINED_IN_FULL[name]} trains it in full")
        near = difflib.get_close_matches(name.rpartition(".")[2] or name, [*linear, ALL_LINEAR], n=1)
        hint = f"did you mean {near[0]!r}?" if near and "*" not in name else f"there are {', '.join(sorted(linear))}, or {ALL_LINEAR!r} alone"
        raise ConfigError(f"lora.target_modules: no linear layer is called {name!r}; {hint}")
    targets = [module for name, module in model.model.named_modules() if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted]
    largest = max(min(module.in_features, module.out_features) for module in targets)
    if section.rank > largest:
        raise ConfigError(f"lora.rank = {section.rank}: no layer with an adapter has a rank above {largest}; give that or less")
    model.requires_grad_(False)
    dtype = model.model.embed_tokens.weight.dtype
    for parent in list(model.model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and name in wanted:
                setattr(parent, name, _adapt(module, name, section, dtype))
    model.model.embed_tokens.requires_grad_(section.train_embeddings)
    if section.train_lm_head:
        model.lm_head.requires_grad_(True)


def _adapt(linear: nn.Linear, name: str, section: Lora, dtype: torch.dtype) -> AdaptedLinear:
    with torch.device("meta"):
        adapted = AdaptedLinear(linear.in_features, linear.out_features, linear.bias is not None, section)
        adapted.to(torch.promote_types(dtype, torch.float32))  # small steps would be lost in less
        weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype)
        if section.quantize_base == "nf4":
            if linear.in_features % BLOCK:
                raise ConfigError(f'lora.quantize_base = "nf4": {name} has {linear.in_features} inputs, which are not a multiple of {BLOCK}')
            weight = torch.empty(linear.out_features, packed_columns(linear.in_features), dtype=torch.uint8)
        adapted.weight = nn.Parameter(weight, requires_grad=False)
        if adapted.bias is not None:
            adapted.bias = nn.Parameter(torch.empty(linear.out_features, dtype=dtype), requires_grad=False)
    return adapted


def is_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(MARKS)


def draw_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A fresh A or B as the full float32 tensor on the CPU, a function of (seed, name): A as Kaiming's uniform with a = sqrt(5), B zeros."""
    if name.endswith(LORA_B):
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
    if magnitude is None:
        return merged
    return merged * (magnitude.to(precise) / merged.norm(dim=1).clamp(min=torch.finfo(precise).tiny))[:, None]
