"""OLMo 2: everything whose config.json says ``Olmo2ForCausalLM`` (OLMo Team 2025, section 3).

Norms stand behind attention and feed-forward, not before them; and queries and keys are normalised, all heads of a token together.
"""

from typing import Any

from tunelib.model.config import LayerNorms, ModelConfig
from tunelib.model.families.family import Family

NORMS = LayerNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm")


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Norms, and biases of all of attention or none."""
    biased = fields.get("attention_bias") or False
    return {"attention_bias": biased, "output_bias": biased, "qk_norm": "projection", "norms": NORMS, "norm_casts_last": True}


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as a field."""
    return {"attention_bias": config.attention_bias}


FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    read=read,
    write=write,
    fields={"attention_bias": bool},
    defaults={"rms_norm_eps": 1e-5},
)
