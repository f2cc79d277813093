"""Qwen 2 and 2.5: everything whose config.json says ``Qwen2ForCausalLM``.

Llama with biases of q, k and v; and, where a config asks for it, a window in the later layers.
"""

from typing import Any

from tunelib.model.config import ModelConfig
from tunelib.model.families.family import Family, read_windows, write_windows

WINDOW_FIELDS = {"use_sliding_window": bool, "sliding_window": int, "max_window_layers": int, "layer_types": list}
WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def read_qwen_windows(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """``sliding_window`` counts where ``use_sliding_window`` says so, in the layers from ``max_window_layers`` on, or those of ``layer_types``."""
    width = fields["sliding_window"] if fields["use_sliding_window"] else None
    first = WINDOW_DEFAULTS["max_window_layers"] if fields["max_window_layers"] is None else fields["max_window_layers"]
    return read_windows({**fields, "sliding_window": width}, range(first, fields["num_hidden_layers"]), where)


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    """The same as fields."""
    first = next((number for number, window in enumerate(config.windows) if window), config.num_hidden_layers)
    return {"use_sliding_window": any(config.windows), "max_window_layers": first, **write_windows(config)}


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Biases of q, k and v, always; and windows."""
    return {"attention_bias": True, **read_qwen_windows(fields, where)}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    read=read,
    write=write_qwen_windows,
    fields=WINDOW_FIELDS,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **WINDOW_DEFAULTS},
)
