"""Gemma 2: everything whose config.json says ``Gemma2ForCausalLM`` (Gemma Team 2024, section 2).

Norms before and after both parts of a layer, whose weights are distances from 1; gelu; scaled embeddings; scores and logits that are capped; and a
window in every other layer, the first among them.
"""

from typing import Any

from tunelib.model.config import LayerNorms, ModelConfig
from tunelib.model.families.family import Family, read_windows, write_windows

NORMS = LayerNorms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """All of it; a cap that is null is none."""
    biased = fields.get("attention_bias") or False
    return {
        "attention_bias": biased,
        "output_bias": biased,
        "hidden_act": "gelu_pytorch_tanh",
        "norms": NORMS,
        "norm_offset": 1.0,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": (fields["query_pre_attn_scalar"] or 256) ** -0.5,
        "attention_softcap": fields["attn_logit_softcapping"] or 0.0,
        "final_softcap": fields["final_logit_softcapping"] or 0.0,
        **read_windows(fields, range(0, fields["num_hidden_layers"], 2), where),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as fields."""
    assert config.attention_scale is not None
    return {
        "attention_bias": config.attention_bias,
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
        **write_windows(config),
    }


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    read=read,
    write=write,
    fields={
        **dict.fromkeys(("query_pre_attn_scalar", "sliding_window"), int),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), float),
        "attention_bias": bool,
        "layer_types": list,
    },
    only=dict.fromkeys(("hidden_activation", "hidden_act"), "gelu_pytorch_tanh"),
    without_effect=("cache_implementation", "sliding_window_size"),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
)
