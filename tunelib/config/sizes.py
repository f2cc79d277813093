"""Named model sizes as plain data: the fields of the ``config.json`` that each was published with.

Sources: the ``config.json`` of meta-llama/*, HuggingFaceTB/SmolLM2-* and TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T on the
Hugging Face Hub. Every size is complete but for ``head_dim``, which is hidden_size / num_attention_heads in all of them.
"""

ARCHITECTURES: tuple[str, ...] = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
)
"""What ``architectures`` in a config.json may name."""


def build_size(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    **others: object,
) -> dict[str, object]:
    """A size's fields, the five that always differ first."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        **others,
    }


def llama3_scaling(factor: float) -> dict[str, object]:
    """The rope_scaling table of Llama 3.1 (factor 8) and 3.2 (factor 32)."""
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def build_params(dim: int, n_layers: int, n_heads: int, **others: object) -> dict[str, object]:
    """What every params.json says, in Meta's names."""
    return {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, **others}


LLAMA_2: dict[str, object] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
LLAMA_3: dict[str, object] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
LLAMA_3_1 = LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": llama3_scaling(8.0)}
LLAMA_3_2 = LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": llama3_scaling(32.0), "tie_word_embeddings": True}
SMOLLM_2: dict[str, object] = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}

SIZES: dict[str, dict[str, object]] = {
    "llama2-7b": build_size(4096, 11008, 32, 32, 32, **LLAMA_2),
    "llama2-13b": build_size(5120, 13824, 40, 40, 40, **LLAMA_2),
    "llama2-70b": build_size(8192, 28672, 80, 64, 8, **LLAMA_2),
    "llama3-8b": build_size(4096, 14336, 32, 32, 8, **LLAMA_3),
    "llama3-70b": build_size(8192, 28672, 80, 64, 8, **LLAMA_3),
    "llama3.1-8b": build_size(4096, 14336, 32, 32, 8, **LLAMA_3_1),
    "llama3.1-70b": build_size(8192, 28672, 80, 64, 8, **LLAMA_3_1),
    "llama3.1-405b": build_size(16384, 53248, 126, 128, 8, **LLAMA_3_1),
    "llama3.2-1b": build_size(2048, 8192, 16, 32, 8, **LLAMA_3_2),
    "llama3.2-3b": build_size(3072, 8192, 28, 24, 8, **LLAMA_3_2),
    "llama3.3-70b": build_size(8192, 28672, 80, 64, 8, **LLAMA_3_1),
    "smollm2-135m": build_size(576, 1536, 30, 9, 3, **SMOLLM_2, initializer_range=0.041666666666666664),
    "smollm2-360m": build_size(960, 2560, 32, 15, 5, **SMOLLM_2),
    "smollm2-1.7b": build_size(2048, 8192, 24, 32, 32, **(SMOLLM_2 | {"rope_theta": 130000.0})),
    "tinyllama-1.1b": build_size(2048, 5632, 22, 32, 4, **(LLAMA_2 | {"max_position_embeddings": 2048})),
}
"""Name for ``model.flavor`` → Hugging Face's config fields."""

META_LLAMA_2: dict[str, object] = {"norm_eps": 1e-5, "vocab_size": -1}
META_LLAMA_3: dict[str, object] = {"norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 500000.0}
META_8B = build_params(4096, 32, 32, multiple_of=1024, n_kv_heads=8, ffn_dim_multiplier=1.3)
META_70B = build_params(8192, 80, 64, multiple_of=4096, n_kv_heads=8, ffn_dim_multiplier=1.3)
META_405B = build_params(16384, 126, 128, multiple_of=4096, n_kv_heads=8, ffn_dim_multiplier=1.2)
META_LLAMA_3_1 = META_LLAMA_3 | {"use_scaled_rope": True}

PARAMS: dict[str, dict[str, object]] = {
    "llama2-7b": build_params(4096, 32, 32, multiple_of=256) | META_LLAMA_2,
    "llama2-13b": build_params(5120, 40, 40, multiple_of=256) | META_LLAMA_2,
    "llama2-70b": META_70B | META_LLAMA_2,
    "llama3-8b": META_8B | META_LLAMA_3,
    "llama3-70b": META_70B | META_LLAMA_3,
    "llama3.1-8b": META_8B | META_LLAMA_3_1,
    "llama3.1-70b": META_70B | META_LLAMA_3_1,
    "llama3.1-405b": META_405B | META_LLAMA_3_1,
    "llama3.2-1b": build_params(2048, 16, 32, multiple_of=256, n_kv_heads=8, ffn_dim_multiplier=1.5) | META_LLAMA_3_1,
    "llama3.2-3b": build_params(3072, 28, 24, multiple_of=256, n_kv_heads=8, ffn_dim_multiplier=1.0) | META_LLAMA_3_1,
    "llama3.3-70b": META_70B | META_LLAMA_3_1,
}
"""Name → the ``params.json`` that Meta published beside its own weights of that size."""
