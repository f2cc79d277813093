"""Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama, SmolLM2: everything whose config.json says ``LlamaForCausalLM``."""

import re
from typing import Any

from tunelib.model.config import ModelConfig
from tunelib.model.families.family import Family, MetaNames

ARCHITECTURE = "LlamaForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Meta's names of the parts of a layer, and of the rest.
META_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
META_REST = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
# The dimension along which Meta's model-parallel files divide a part; norms are in every file.
META_SPLIT = dict.fromkeys(("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output"), 0) | {
    "attention.wo": 1,
    "feed_forward.w2": 1,
}
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
"""Parts whose rows Meta keeps in pairs."""
_HF_LAYER, _HF_REST = ({meta: hf for hf, meta in names.items()} for names in (META_LAYER, META_REST))


def to_meta_name(name: str) -> str | None:
    """Meta's name of a Hugging Face weight; None where it has none."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        part = META_LAYER.get(match[2])
        return part and f"layers.{match[1]}.{part}.{match[3]}"
    module, _, kind = name.rpartition(".")
    return f"{META_REST[module]}.{kind}" if module in META_REST else None


def to_hf_name(name: str) -> str | None:
    """The Hugging Face name of one of Meta's weights; None where it has none."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        part = _HF_LAYER.get(match[2])
        return part and f"model.layers.{match[1]}.{part}.{match[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_HF_REST[module]}.{kind}" if module in _HF_REST else None


def rotary_head_dim(name: str, config: ModelConfig) -> int:
    """Rows of one head of a Hugging Face weight whose rows Meta orders in pairs; 0 for all others."""
    return config.head_dim if any(f".{part}." in name for part in ROTARY) else 0


def meta_split(name: str, config: ModelConfig) -> tuple[int | None, int]:
    """The dimension along which Meta's model-parallel files divide a Hugging Face weight, None for one that each holds whole, and the
    number of rows or columns there that must stay together.

    Llama 3 divides its embedding by rows, Llama 2 by columns (the two are told apart by the rotary base); a tied one is divided as
    the head is, by rows.
    """
    if name == EMBEDDING:
        return (1 if config.rope_theta == 10000.0 and not config.tie_word_embeddings else 0), 1
    meta_name = to_meta_name(name)
    dim = next((dim for part, dim in META_SPLIT.items() if f".{meta_name}".endswith(f".{part}.weight")), None)
    return dim, config.head_dim if ".self_attn." in name else 1


def read(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Biases of all of attention, and of the feed-forward."""
    biased = fields.get("attention_bias", False) or False
    return {"attention_bias": biased, "output_bias": biased, "mlp_bias": fields.get("mlp_bias", False) or False}


def write(config: ModelConfig) -> dict[str, Any]:
    """The same as fields."""
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    architecture=ARCHITECTURE,
    model_type="llama",
    read=read,
    write=write,
    fields={"attention_bias": bool, "mlp_bias": bool},
    without_effect=("is_llama_config", "pretraining_tp"),
    meta=MetaNames(to_meta_name, to_hf_name, rotary_head_dim, meta_split),
    embedding=EMBEDDING,
    head=HEAD,
)
parse_config, hf_config = FAMILY.parse_config, FAMILY.hf_config
