"""The shape of a model, in Hugging Face's field names."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (see `tunelib.model.rope`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LayerNorms:
    """The names of a layer's norms by their places; empty for none there."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that there are."""
        return tuple(name for name in (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp) if name)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the decoder needs to know of an architecture; made by a family's ``parse_config``.

    What has a default is Llama's way, from which other families depart.

    Attributes:
        attention_bias: of q, k and v; output_bias: of o_proj.
        fused_projections: q, k and v are one matrix (qkv_proj), gate and up another (gate_up_proj).
        qk_norm: queries and keys are normalised before they are turned: head by head, or all heads of a token together.
        norm_offset: what is added to a norm's weight.
        norm_casts_last: norms are multiplied with their weight before they are cast to the type of the layers.
        embedding_scale: what embeddings are multiplied with.
        attention_scale: what queries times keys are multiplied with; None: 1 / sqrt(head_dim).
        attention_softcap, final_softcap: scores, and logits, become cap · tanh(x / cap); 0: they stay.
        windows: by layer, of how many tokens a query sees keys, its own included, 0 for all; empty: all layers see all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float
    output_bias: bool = False
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    fused_projections: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    norms: LayerNorms = LayerNorms()
    norm_offset: float = 0.0
    norm_casts_last: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    windows: tuple[int, ...] = ()
