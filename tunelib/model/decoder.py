"""The decoder-only transformer, with Hugging Face's parameter names (``model.layers.0.self_attn.q_proj.weight``).

B batch, S sequence, V vocabulary.
"""

import copy
import hashlib
from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelib.model.attention import Attention, Documents, Segments, attend, plan_documents
from tunelib.model.cache import KeyValues
from tunelib.model.config import ModelConfig
from tunelib.model.loss import summed_loss, token_scores
from tunelib.model.rope import rope_tables


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the division in float32 or better (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(precise, (x.shape[-1],), eps=self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream.

    What is before and after `attend` is a method each: pieces that a compiler can take whole.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        return self.finish(x, attend(*self.begin(x, rope), documents))

    def begin(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, hidden) → q (B, S, H, D), k and v (B, S, K, D)."""
        return self.self_attn(self.input_layernorm(x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """(B, S, hidden) and (B, S, H, D) → (B, S, hidden)."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderBody(nn.Module):
    """Everything but the head: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(number): DecoderLayer(config) for number in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs: Tensor, positions: Tensor, document_lengths: tuple[int, ...] | Segments | KeyValues) -> Tensor:
        x = self.embed_tokens(inputs)
        rope = rope_tables(self.config, positions, x.dtype)
        documents = plan_documents(document_lengths, x, self.config.head_dim)
        for layer in self.layers.values():
            x = layer(x, rope, documents)
        return self.norm(x)


class HeadShare(Protocol):
    """Head and loss where the vocabulary is split over processes (`tunelib.parallel.tensor`)."""

    def pad(
        self, tokens: Tensor, positions: Tensor, labels: Tensor | None, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]]: ...
    def loss(self, hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor: ...
    def scores(self, hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor: ...
    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor: ...


class Decoder(nn.Module):
    """A causal language model.

    Called with labels it returns the summed loss of the micro-batch (`summed_loss`), or, where ``score`` asks for it, what it thinks of each
    labelled token (`token_scores`, on every process); without, the logits (B, S, V). One that has lost its last
    layers (`keep`) returns hidden states (B, S, hidden), and one without the first takes them in place of tokens.

    Attributes:
        share: where rows are cut over processes, gives this one's part of tokens, positions and labels, and its segments; set from outside.
        head_share: where the vocabulary is split over processes, computes loss and logits; set from outside.
        pipeline: where layers lie on several processes, takes a micro-batch through all of them; set from outside.
    """

    share: Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], tuple[Tensor, Tensor, Tensor, Segments]] | None = None
    head_share: HeadShare | None = None
    pipeline: Callable[[Tensor, Tensor, tuple[int, ...], Tensor | None, bool], Tensor] | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = DecoderBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head use the embedding's weight, where the architecture says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return isinstance(self.model.embed_tokens, nn.Embedding)

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return isinstance(self.lm_head, nn.Linear)

    def keep(self, layers: Collection[int]) -> None:
        """Leave out all layers but these, the embedding without the first layer, and norm and head without the last. Names stay as they are."""
        last = self.config.num_hidden_layers - 1
        for number in set(range(last + 1)) - set(layers):
            del self.model.layers[str(number)]
        if 0 not in layers:
            self.model.add_module("embed_tokens", nn.Identity())
        if last not in layers:
            self.model.add_module("norm", nn.Identity())
            self.add_module("lm_head", nn.Identity())

    def part(self, layers: Collection[int]) -> "Decoder":
        """Some of the layers as a model of its own, whose modules are this model's."""
        shared = (self.model.embed_tokens, *self.model.layers.values(), self.model.norm, self.lm_head)
        part = copy.deepcopy(self, {id(module): module for module in shared})
        part.keep(layers)
        return part

    def forward(
        self, inputs: Tensor, positions: Tensor, document_lengths: tuple[int, ...], labels: Tensor | None = None, score: bool = False
    ) -> Tensor:
        if self.pipeline is not None:
            return self.pipeline(inputs, positions, document_lengths, labels, score)
        tokens = inputs if self.is_first else positions  # in whose place a later part has hidden states, cut and padded already
        documents: tuple[int, ...] | Segments = document_lengths
        width, is_cut = positions.shape[1], self.share is not None and labels is not None and not score
        if self.head_share is not None and not is_cut:
            tokens, positions, labels, documents = self.head_share.pad(tokens, positions, labels, document_lengths)
        if is_cut:
            assert self.share is not None
            assert labels is not None
            tokens, positions, labels, documents = self.share(tokens, positions, labels, document_lengths)
        hidden = self.model(tokens if self.is_first else inputs, positions, documents)
        if not self.is_last:
            return hidden
        if labels is not None and score:
            return token_scores(hidden, labels, self.lm_head) if self.head_share is None else self.head_share.scores(hidden, labels, self.lm_head)
        if labels is not None:
            if self.head_share is not None:
                return self.head_share.loss(hidden, labels, self.lm_head)
            return summed_loss(hidden, labels, self.lm_head.weight)
        return self.lm_head(hidden) if self.head_share is None else self.head_share.logits(hidden, self.lm_head)[:, :width]


def build_on_meta(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The model without storage: every parameter on the meta device, in the dtype that it will be trained in."""
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def draw_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """A fresh parameter as the full float32 tensor on the CPU: a pure function of (seed, name), the same on every layout (law 2).

    Norms are ones and biases zeros; matrices are normal with ``initializer_range``, those that write into the residual stream
    divided by sqrt(2 · layers) (GPT-2, section 2.3).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers on the CPU that follow from (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
