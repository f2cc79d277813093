"""The next token, from logits. B rows, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tunelib.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only so many of the most probable tokens; 0 for all.
        top_p: only the most probable tokens whose shares first add up to this (Holtzman et al. 2020, section 3.1).
        seed: of what is drawn. The first text draws from it, the next from the one after it: a text's draws do not depend on those beside it.

    Raises:
        ConfigError: values that mean nothing, or that would have no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature:g}: it is 0, for the most probable token, or more, such as 0.7")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_k {self.top_k}, top_p {self.top_p:g}: top_k is 0 (all tokens) or more, and top_p above 0 and at most 1")
        if not 0 <= self.seed < 2**63 - 2**32:
            raise ConfigError(f"seed {self.seed}: it is 0 or more, and less than 2**63 - 2**32")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p choose among tokens that are drawn, and with temperature 0 none is: give a temperature, such as 0.7")

    def generators(self, num_rows: int) -> list[torch.Generator]:
        """A stream of random numbers for each row."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(num_rows)]


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Token ids, (B,), from logits (B, V); each row draws from its own generator."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    shares = torch.softmax(restrict(logits.float() / sampling.temperature, sampling), dim=-1).cpu().double()
    drawn = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    reached = shares.cumsum(dim=-1)
    places = torch.searchsorted(reached, (drawn * reached[:, -1])[:, None], right=True)  # the first that is passed
    return places.squeeze(1).clamp(max=shares.shape[1] - 1).to(logits.device)


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V), divided by the temperature, with minus infinity where a token is not to be chosen; the most probable one always may be."""
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= sampling.top_p  # what is before a token is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, places, beyond), -torch.inf)
    return logits
