"""Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama, SmolLM2: everything whose config.json says ``LlamaForCausalLM``."""

from typing import Any

from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Every field that is read, with its type; numbers are above 0. Where null is allowed it means the default.
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
    return ModelConfig(
        architecture=ARCHITECTURE,
        **{name: fields[name] for name in REQUIRED},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=given.get("max_position_embeddings", 2048),
        rms_norm_eps=given.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", given.get("rope_theta", 10000.0))),
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
    if not (is_number and value > 0 if kind in (int, float) else isinstance(value, kind)):
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
