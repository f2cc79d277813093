"""Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama, SmolLM2: everything whose config.json says ``LlamaForCausalLM``."""

import re
from typing import Any

from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Every field that is read, with its type; numbers are above 0. Where null is allowed it means the default.
LARGEST = 2**63
"""What no number of a config.json reaches; Python's own may have any size."""
FIELDS: dict[str, type] = {
    **dict.fromkeys((*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"), float),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
    "hidden_act": str,
}
# Fields that say nothing about the computation, or only about inference.
WITHOUT_EFFECT = {
    *("_name_or_path", "_attn_implementation_autoset", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("generation_config", "id2label", "is_llama_config", "label2id", "max_length", "model_type", "pad_token_id", "pretraining_tp"),
    *("return_dict", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "use_cache", "tie_encoder_decoder"),
}


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tensors that follow from the config, which other tools store besides; by the last parts of their names.
DERIVED = ("rope.freqs", "freqs_cis", "rotary_emb.inv_freq")
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


def parse_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """The model that a Llama config.json describes; raises FormatError naming the field that cannot be kept."""
    if missing := [name for name in REQUIRED if name not in fields]:
        raise FormatError(f"{where} lacks {', '.join(missing)}")
    for name, value in fields.items():
        if name in FIELDS and not (value is None and name not in REQUIRED):
            _check_value(name, value, where)
        elif name not in FIELDS and name not in WITHOUT_EFFECT and (value is True or value not in (None, False, 0, 0.0, 1.0, "", [], {})):
            raise FormatError(f"{where}: {name} = {value!r} is not supported for {ARCHITECTURE}")
    rope = fields.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling together
    scaling = _parse_scaling(fields.get("rope_scaling") or rope, where)
    if rope and scaling != _parse_scaling(rope, where):
        raise FormatError(f"{where}: rope_parameters and rope_scaling ask for different scalings")
    given = {"partial_rotary_factor": rope.get("partial_rotary_factor"), **{name: value for name, value in fields.items() if value is not None}}
    for name, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if given.get(name) not in (None, only):
            raise FormatError(f"{where}: {name} = {given[name]!r} is not supported for {ARCHITECTURE}; only {only!r} is")
    heads = fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise FormatError(f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    if head_dim % 2:
        raise FormatError(f"{where}: head_dim = {head_dim} is odd; rotary positions turn pairs")
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    _check_value("rope_theta", theta, where)
    return ModelConfig(
        architecture=ARCHITECTURE,
        **{name: fields[name] for name in REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=given.get("max_position_embeddings", 2048),
        rms_norm_eps=given.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=scaling,
        tie_word_embeddings=given.get("tie_word_embeddings", False),
        attention_bias=given.get("attention_bias", False),
        mlp_bias=given.get("mlp_bias", False),
        initializer_range=given.get("initializer_range", 0.02),
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, as transformers writes it."""
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.initializer_range,
    }


def _check_value(name: str, value: Any, where: str) -> None:
    kind = FIELDS[name]
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < LARGEST if kind in (int, float) else isinstance(value, kind)):
        expected = {int: "a whole number from 1 up", float: "a number above 0", bool: "true or false", dict: "a table", str: "text"}[kind]
        raise FormatError(f"{where}: {name} = {value!r} is not {expected}")


def _parse_scaling(scaling: dict[str, Any], where: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise FormatError(f"{where}: rope_scaling of type {kind!r} is not supported; 'default' and 'llama3' are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in scaling]:
        raise FormatError(f"{where}: rope_scaling lacks {', '.join(missing)}")
    if wrong := [name for name in names if isinstance(scaling[name], bool) or not isinstance(scaling[name], (int, float)) or scaling[name] <= 0]:
        raise FormatError(f"{where}: rope_scaling: {wrong[0]} = {scaling[wrong[0]]!r} is not a number above 0")
    return RopeScaling(**{name: scaling[name] for name in names})
