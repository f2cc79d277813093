"""The reference of Meta's Llama computes what transformers does, for weights whose rows are moved by an explicit rule and not otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.meta_reference import make_meta_folder, meta_logits, random_meta_state
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE, CONTEXT = 128, 64  # a context so short that 96 tokens meet kept, blended and slowed rotations
PLAIN = {"rope_theta": 500_000.0}
SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    "MHA": ({"dim": 64, "n_layers": 3, "n_heads": 4, "multiple_of": 16}, 1.0),
    "GQA": ({"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 32, "ffn_dim_multiplier": 1.3, **PLAIN}, 1.0),
    "MHA scaled by 8": ({"dim": 128, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "use_scaled_rope": True, **PLAIN}, 8.0),
    "GQA scaled by 32": ({"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 64, "use_scaled_rope": True, **PLAIN}, 32.0),
}
"""Name → params.json and rope factor."""
HF_NAMES = {f"attention.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"} | {
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}


def hf_name(name: str) -> str:
    """layers.0.attention.wq.weight → model.layers.0.self_attn.q_proj.weight"""
    if name in OUTER:
        return OUTER[name]
    layers, number, *inner, weight = name.split(".")
    return ".".join(("model", layers, number, HF_NAMES[".".join(inner)], weight))


def pairs_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k: Meta turns row 2i of a head against row 2i + 1, Hugging Face row i against row i + D/2."""
    moved = torch.empty_like(weight)
    head_dim = len(weight) // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            moved[head * head_dim + pair] = weight[head * head_dim + 2 * pair]
            moved[head * head_dim + head_dim // 2 + pair] = weight[head * head_dim + 2 * pair + 1]
    return moved


def as_transformers(params: dict[str, Any], factor: float, state: dict[str, Tensor], is_moved: bool = True) -> LlamaForCausalLM:
    kv_heads = params.get("n_kv_heads", params["n_heads"])
    scaling: dict[str, Any] = {"rope_type": "default"}
    if params.get("use_scaled_rope"):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = CONTEXT
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=params["dim"],
        intermediate_size=len(state["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=kv_heads,
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_parameters={"rope_theta": params.get("rope_theta", 10000.0), **scaling},
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    heads = {"wq": params["n_heads"], "wk": kv_heads} if is_moved else {}
    weights = {}
    for name, tensor in state.items():
        part = name.split(".")[-2]
        weights[hf_name(name)] = pairs_to_halves(tensor, heads[part]) if part in heads else tensor
    model.load_state_dict(weights)
    return model


def draw_tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (1, 96), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_transformers(shape: str) -> None:
    params, factor = SHAPES[shape]
    state, tokens = random_meta_state(params, VOCAB_SIZE, seed=0), draw_tokens()
    with torch.no_grad():
        expected = as_transformers(params, factor, state)(tokens).logits
    found = meta_logits(params, state, tokens, factor, CONTEXT)
    assert found.shape == (1, 96, VOCAB_SIZE)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32, another order of summation


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_left_in_place_show_in_the_logits(shape: str) -> None:
    params, factor = SHAPES[shape]
    state, tokens = random_meta_state(params, VOCAB_SIZE, seed=0), draw_tokens()
    with torch.no_grad():
        unmoved = as_transformers(params, factor, state, is_moved=False)(tokens).logits
    assert (meta_logits(params, state, tokens, factor, CONTEXT) - unmoved).abs().max() > 1


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "scaled" in shape])
def test_rope_factor_shows_in_the_logits(shape: str) -> None:
    params, factor = SHAPES[shape]
    state, tokens = random_meta_state(params, VOCAB_SIZE, seed=0), draw_tokens()
    scaled = meta_logits(params, state, tokens, factor, CONTEXT)
    for other in (meta_logits({**params, "use_scaled_rope": False}, state, tokens), meta_logits(params, state, tokens, factor * 2, CONTEXT)):
        assert (scaled - other).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_holds_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    params, _ = SHAPES["GQA"]
    state = random_meta_state(params, VOCAB_SIZE, seed=0, dtype=dtype)
    make_meta_folder(tmp_path / "in", params, state)
    assert json.loads((tmp_path / "in/params.json").read_text()) == params
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["consolidated.00.pth", "params.json"]
    loaded = torch.load(tmp_path / "in/consolidated.00.pth", weights_only=True)
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("embedding_split", ["columns", "rows"])
def test_parts_of_model_parallel_files_make_the_whole(tmp_path: Path, embedding_split: str) -> None:
    params, _ = SHAPES["GQA"]
    state = random_meta_state(params, VOCAB_SIZE, seed=0)
    make_meta_folder(tmp_path, params, state, model_parallel=2, embedding_split=embedding_split, extras=True)
    first, second = (torch.load(tmp_path / f"consolidated.0{rank}.pth", weights_only=True) for rank in (0, 1))
    dims = {**dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0), "wo": 1, "w2": 1}
    dims["tok_embeddings"] = 1 if embedding_split == "columns" else 0
    for name, tensor in state.items():
        dim = dims.get(name.split(".")[-2])
        if dim is None:
            assert torch.equal(first[name], tensor)
            assert torch.equal(second[name], tensor)
        else:
            assert torch.equal(torch.cat((first[name], second[name]), dim), tensor)
            assert first[name].untyped_storage().nbytes() == tensor.nbytes // 2
    assert first.keys() - state.keys() == second.keys() - state.keys() == {"rope.freqs"}


def test_weights_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    params, _ = SHAPES["GQA"]
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        make_meta_folder(tmp_path, params, random_meta_state(params, VOCAB_SIZE, seed=0), model_parallel=3)
