"""The decoder-only transformer, with Hugging Face's parameter names (``model.layers.0.self_attn.q_proj.weight``).

B batch, S sequence, V vocabulary.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunelib.model.attention import Attention, Documents, Segments, attend, plan_documents
from tunelib.model.cache import KeyValues
from tunelib.model.config import ModelConfig
from tunelib.model.form import form_of
from tunelib.model.loss import capped, find_labelled, summed_loss, take, token_scores
from tunelib.model.norm import build_norm
from tunelib.model.rope import rope_tables

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh")}

FASTER_TURNED = 32
"""So many rows at most: on a CPU the head's matrix times few columns takes a third to four fifths of the time of few rows times the matrix."""
FEW = 0.8
"""So large a share of positions at most, beside which taking them out of all, and running them without a compiled graph, costs little."""


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); or GEGLU, with gelu (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation, self.is_fused = ACTIVATIONS[config.hidden_act], config.fused_projections
        if self.is_fused:
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        else:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with norms where the family has them, and added to the residual stream.

    What is before and after `attend` is a method each: pieces that a compiler can take whole.

    Args:
        number: of the layer in its model.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.norms, self.form = config.norms, form_of(config, number)
        self._add_norm(self.norms.before_attention, config)
        self.self_attn = Attention(config)
        self._add_norm(self.norms.after_attention, config)
        self._add_norm(self.norms.before_mlp, config)
        self.mlp = FeedForward(config)
        self._add_norm(self.norms.after_mlp, config)

    def _add_norm(self, name: str, config: ModelConfig) -> None:
        if name:
            self.add_module(name, build_norm(config, config.hidden_size))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], documents: Documents, asked: Tensor | None = None) -> Tensor:
        """(B, S, hidden) → the same; or, of the positions in ``asked`` (T), counted over all rows, (T, hidden)."""
        attended = attend(*self.begin(x, rope), documents, self.form)
        if asked is not None:
            x, attended = take(asked, x), take(asked, attended)
        return self.finish(x, attended)

    def begin(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, hidden) → q (B, S, H, D), k and v (B, S, K, D)."""
        return self.self_attn(self._normed(self.norms.before_attention, x), rope)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """(…, hidden) and (…, H, D) → (…, hidden)."""
        x = x + self._normed(self.norms.after_attention, self.self_attn.o_proj(attended.flatten(-2)))
        return x + self._normed(self.norms.after_mlp, self.mlp(self._normed(self.norms.before_mlp, x)))

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x) if name else x


class DecoderBody(nn.Module):
    """Everything but the head: token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(number): DecoderLayer(config, number) for number in range(config.num_hidden_layers)})
        self.norm = build_norm(config, config.hidden_size)

    def forward(
        self, inputs: Tensor, positions: Tensor, document_lengths: tuple[int, ...] | Segments | KeyValues, asked: Tensor | None = None
    ) -> Tensor:
        x = self.embed_tokens(inputs)
        if isinstance(self.embed_tokens, nn.Embedding):
            x = scaled(self.config, x)
        rope = rope_tables(self.config, positions, x.dtype)
        documents = plan_documents(document_lengths, x, self.config.head_dim, self.config.windows, self.config.attention_softcap)
        *others, last = self.layers.values()
        for layer in others:
            x = layer(x, rope, documents)
        return self.norm(last(x, rope, documents, asked))


def scaled(config: ModelConfig, embedded: Tensor) -> Tensor:
    """Embeddings as the first layer takes them: times the family's scale, which is rounded to their type as transformers does."""
    return embedded if config.embedding_scale == 1 else embedded * torch.tensor(config.embedding_scale, dtype=embedded.dtype)


class HeadShare(Protocol):
    """Head and loss where the vocabulary is split over processes (`tunelib.parallel.tensor`)."""

    def pad(
        self, tokens: Tensor, positions: Tensor, labels: Tensor | None, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]]: ...
    def loss(self, hidden: Tensor, asked: Tensor, labels: Tensor, head: nn.Module) -> Tensor: ...  # hidden (B, S, hidden), the others (T)
    def scores(self, hidden: Tensor, asked: Tensor, labels: Tensor, head: nn.Module) -> Tensor: ...
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
        asked = None if labels is None or not self.is_last else find_labelled(labels)
        # Where they are few, what follows the last attention is not computed for others, if processes do not share the work on each.
        ends_there = asked is not None and self.head_share is None and len(asked) <= FEW * positions.numel()
        hidden = self.model(tokens if self.is_first else inputs, positions, documents, asked if ends_there else None)
        if not self.is_last:
            return hidden
        if labels is None or asked is None:
            if self.head_share is None:
                return self.logits_of(hidden)
            return capped(self.head_share.logits(hidden, self.lm_head)[:, :width], self.config.final_softcap)
        labels = take(asked, labels)
        if self.head_share is not None:
            return (self.head_share.scores if score else self.head_share.loss)(hidden, asked, labels, self.lm_head)
        if not ends_there:
            hidden = take(asked, hidden)
        if score:
            return token_scores(hidden, labels, self.lm_head, self.config.final_softcap)
        return summed_loss(hidden, labels, self.lm_head.weight, softcap=self.config.final_softcap)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """(…, hidden) after the last norm → (…, V), where the head is whole."""
        weight = self.lm_head.weight
        is_plain = type(weight) is nn.Parameter and self.lm_head.bias is None
        if hidden.dim() == 2 and 1 < len(hidden) <= FASTER_TURNED and hidden.device.type == "cpu" and is_plain:
            return capped((weight @ hidden.T).T, self.config.final_softcap)
        return capped(self.lm_head(hidden), self.config.final_softcap)


def build_on_meta(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The model without storage: every parameter on the meta device, in the dtype that it will be trained in."""
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def draw_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """A fresh parameter as the full float32 tensor on the CPU: a pure function of (seed, name), the same on every layout (law 2).

    Norms multiply with one and biases are zeros; matrices are normal with ``initializer_range``, those that write into the residual stream
    divided by sqrt(2 · layers) (GPT-2, section 2.3).
    """
    if name.endswith("norm.weight"):
        return torch.full(shape, 1.0 - config.norm_offset)
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
