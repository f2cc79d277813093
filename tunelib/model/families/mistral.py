"""Mistral 7B and its kin: everything whose config.json says ``MistralForCausalLM``. Llama, with a window in all layers or in none."""

from typing import Any

from tunelib.model.config import ModelConfig
from tunelib.model.families.family import Family, read_windows


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """``sliding_window``: a number for all layers, or null for none."""
    return read_windows(fields, range(fields["num_hidden_layers"]), where)


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as a field."""
    return {"sliding_window": max(config.windows, default=0) or None}


FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    read=read,
    write=write,
    fields={"sliding_window": int},
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)
