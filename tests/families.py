"""Small models of every family as transformers makes them, drawn so that whatever a family does differently shows."""

from pathlib import Path
from typing import Any

import foreign
import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
WINDOW = 11
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
# Caps so low that they bend what is there.
GEMMA_2 = {"head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": WINDOW}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "Mistral without a window": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "Qwen 2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "Qwen 2 with windows": ("Qwen2", {"tie_word_embeddings": True, **QWEN_WINDOWS}),
    "Qwen 3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "Qwen 3 with windows and biases": ("Qwen3", {"head_dim": 16, "attention_bias": True, **QWEN_WINDOWS}),
    "Phi-3": ("Phi3", {"sliding_window": WINDOW, "num_key_value_heads": 4}),
    "Phi-4": ("Phi3", {"sliding_window": None, "tie_word_embeddings": True}),
    "Gemma 2": ("Gemma2", {"tie_word_embeddings": True, **GEMMA_2}),
    "Gemma 2 without caps": ("Gemma2", {**GEMMA_2, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 2 with biases": ("Olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
}
"""Name → transformers' name of the family, and fields besides `SHAPE`."""
FIRST_CASES = [
    next(name for name, (family, _) in CASES.items() if family == wanted) for wanted in dict.fromkeys(family for family, _ in CASES.values())
]
"""A case of each family."""


def make_family(folder: Path, case: str, tokenizer: Path | None = None, **more: Any) -> Any:
    """A folder as transformers writes it, and its model; with the files and the vocabulary of a tokenizer, rounded up to even, where there is one."""
    family, fields = CASES[case]
    fields = SHAPE | fields | more
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        special = foreign.copy_tokenizer(tokenizer, folder)
        fields |= special | {"vocab_size": special["vocab_size"] + special["vocab_size"] % 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms are drawn as ones or zeros and biases as zeros, which would hide them
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return model
