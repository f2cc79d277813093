"""Qwen 3, the dense ones: everything whose config.json says ``Qwen3ForCausalLM``.

Queries and keys are normalised head by head before they are turned; windows as in Qwen 2.
"""

from typing import Any

from tunelib.model.config import ModelConfig
from tunelib.model.families.family import Family
from tunelib.model.families.qwen2 import WINDOW_DEFAULTS, WINDOW_FIELDS, read_qwen_windows, write_qwen_windows


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Norms of queries and keys, biases of all of attention or none, and windows."""
    biased = fields.get("attention_bias") or False
    return {"qk_norm": "head", "attention_bias": biased, "output_bias": biased, **read_qwen_windows(fields, where)}


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as fields."""
    return {"attention_bias": config.attention_bias, **write_qwen_windows(config)}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    read=read,
    write=write,
    fields={"attention_bias": bool, **WINDOW_FIELDS},
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **WINDOW_DEFAULTS},
)
