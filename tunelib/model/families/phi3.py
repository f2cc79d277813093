"""Phi-3 and Phi-4: everything whose config.json says ``Phi3ForCausalLM``.

q, k and v are one matrix, gate and up another, and stay so. What is not built: positions stretched by "longrope" (Phi-3's 128k models) and heads
that are turned in part (Phi-4-mini).
"""

from typing import Any

from tunelib.model.config import ModelConfig
from tunelib.model.families.family import Family, read_windows


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Fused projections, and ``sliding_window`` for all layers, or null for none."""
    return {"fused_projections": True, **read_windows(fields, range(fields["num_hidden_layers"]), where)}


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as a field."""
    without_default = {"pad_token_id": None}  # which is beyond a smaller vocabulary
    return {"sliding_window": max(config.windows, default=0) or None, **without_default}


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    read=read,
    write=write,
    fields={"sliding_window": int},
    without_effect=("auto_map", "original_max_position_embeddings"),  # the latter is for longrope
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
