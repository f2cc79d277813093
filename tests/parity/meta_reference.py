"""Meta's Llama from its published equations, and folders in the form in which Meta publishes weights.

Written apart from tunelib and from transformers, so that a converter can be held against it. Slow and plain: one sequence, no cache,
float32. Equations: RMSNorm (arXiv 1910.07467), rotary positions as a turn of complex numbers made of neighbouring pairs (arXiv
2104.09864, section 3.4.2), SwiGLU (arXiv 2002.05202), grouped queries (arXiv 2305.13245), and Llama 3.1's slowed rotations.

S sequence, H heads, K key-value heads, D head dim, C = D/2 complex numbers per head, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPLIT_ON_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
SPLIT_ON_COLUMNS = ("wo", "w2")


def meta_logits(params: dict[str, Any], state: dict[str, Tensor], tokens: Tensor, rope_factor: float = 8.0, original_context: int = 8192) -> Tensor:
    """Logits (1, S, V) in float32 for token ids (1, S).

    Args:
        params: the content of a params.json.
        state: weights in Meta's names.
        rope_factor: by how much slow rotations are slowed further, where params say ``use_scaled_rope``.
        original_context: the context length that they are measured against; Meta's is 8192.
    """
    weights = {name: tensor.float() for name, tensor in state.items()}
    epsilon = params.get("norm_eps", 1e-5)
    turns = rotary_turns(params, tokens.shape[1], rope_factor, original_context)
    hidden = weights["tok_embeddings.weight"][tokens[0]]  # (S, dim)
    for number in range(params["n_layers"]):
        layer = f"layers.{number}"
        normed = rms_norm(hidden, weights[f"{layer}.attention_norm.weight"], epsilon)
        hidden = hidden + attention(params, weights, f"{layer}.attention", normed, turns)
        normed = rms_norm(hidden, weights[f"{layer}.ffn_norm.weight"], epsilon)
        gate, up = normed @ weights[f"{layer}.feed_forward.w1.weight"].T, normed @ weights[f"{layer}.feed_forward.w3.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[f"{layer}.feed_forward.w2.weight"].T
    return (rms_norm(hidden, weights["norm.weight"], epsilon) @ weights["output.weight"].T)[None]


def rotary_turns(params: dict[str, Any], length: int, rope_factor: float, original_context: int) -> Tensor:
    """What each complex number is multiplied with at each position, (S, C) complex."""
    head_dim = params["dim"] // params["n_heads"]
    radians = [params.get("rope_theta", 10000.0) ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    if params.get("use_scaled_rope"):
        radians = [slow_down(speed, rope_factor, original_context) for speed in radians]
    angles = torch.outer(torch.arange(length, dtype=torch.float32), torch.tensor(radians, dtype=torch.float32))
    return torch.polar(torch.ones_like(angles), angles)


def slow_down(speed: float, factor: float, original_context: int) -> float:
    """Llama 3.1: keep what turns four times or more in the original context, slow what does not turn once, blend between."""
    num_turns = original_context * speed / (2 * math.pi)
    if num_turns > 4:
        return speed
    if num_turns < 1:
        return speed / factor
    kept = (num_turns - 1) / (4 - 1)
    return (1 - kept) * speed / factor + kept * speed


def attention(params: dict[str, Any], weights: dict[str, Tensor], name: str, x: Tensor, turns: Tensor) -> Tensor:
    """Causal attention over one sequence, (S, dim) → (S, dim)."""
    length, num_heads = len(x), params["n_heads"]
    num_kv_heads = params.get("n_kv_heads") or num_heads
    queries = rotate_pairs((x @ weights[f"{name}.wq.weight"].T).view(length, num_heads, -1), turns)  # (S, H, D)
    keys = rotate_pairs((x @ weights[f"{name}.wk.weight"].T).view(length, num_kv_heads, -1), turns)  # (S, K, D)
    values = (x @ weights[f"{name}.wv.weight"].T).view(length, num_kv_heads, -1)
    keys, values = (part.repeat_interleave(num_heads // num_kv_heads, dim=1) for part in (keys, values))  # (S, H, D)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(queries.shape[-1])
    hidden_from = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    shares = scores.masked_fill(hidden_from, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", shares, values).reshape(length, -1) @ weights[f"{name}.wo.weight"].T


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), … of each head, (S, H, D)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))  # (S, H, C)
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x over the root of its mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight


def meta_shapes(params: dict[str, Any], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every weight of a model, in the order in which Meta's files hold them."""
    dim, num_heads = params["dim"], params["n_heads"]
    kv_dim = (params.get("n_kv_heads") or num_heads) * (dim // num_heads)
    width = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    width = math.ceil(width / params.get("multiple_of", 256)) * params.get("multiple_of", 256)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab_size, dim)}
    for number in range(params["n_layers"]):
        layer = f"layers.{number}"
        shapes |= {f"{layer}.attention.wq.weight": (dim, dim), f"{layer}.attention.wk.weight": (kv_dim, dim)}
        shapes |= {f"{layer}.attention.wv.weight": (kv_dim, dim), f"{layer}.attention.wo.weight": (dim, dim)}
        shapes |= {f"{layer}.feed_forward.w1.weight": (width, dim), f"{layer}.feed_forward.w2.weight": (dim, width)}
        shapes |= {f"{layer}.feed_forward.w3.weight": (width, dim)}
        shapes |= {f"{layer}.attention_norm.weight": (dim,), f"{layer}.ffn_norm.weight": (dim,)}
    return shapes | {"norm.weight": (dim,), "output.weight": (vocab_size, dim)}


def random_meta_state(params: dict[str, Any], vocab_size: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights large enough for the logits to be several units, and for attention to look at some tokens more than at others."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in meta_shapes(params, vocab_size).items():
        drawn = torch.randn(shape, generator=generator)
        state[name] = (1 + 0.3 * drawn if len(shape) == 1 else drawn * 2 / math.sqrt(shape[-1])).to(dtype)
    return state


def make_meta_folder(
    folder: Path,
    params: dict[str, Any],
    state: dict[str, Tensor],
    model_parallel: int = 1,
    embedding_split: str = "columns",
    extras: bool = False,
) -> Path:
    """Write params.json and consolidated.00.pth, consolidated.01.pth, …: one file for each model-parallel rank.

    Args:
        embedding_split: how tok_embeddings is split: on "columns" (Llama 2) or on "rows" (Llama 3).
        extras: add rope.freqs, which Llama 2's files hold though it follows from params.json.
    """
    if embedding_split not in ("columns", "rows"):
        raise ValueError(f"embedding_split = {embedding_split!r}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(model_parallel):
        part = {name: cut(name, tensor, rank, model_parallel, embedding_split) for name, tensor in state.items()}
        if extras:
            head_dim = params["dim"] // params["n_heads"]
            part["rope.freqs"] = params.get("rope_theta", 10000.0) ** (-torch.arange(0, head_dim, 2) / head_dim)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    return folder


def cut(name: str, tensor: Tensor, rank: int, model_parallel: int, embedding_split: str) -> Tensor:
    """A rank's part of a weight, in storage of its own: torch.save would write all of a larger one."""
    layer = name.split(".")[-2]
    if layer in SPLIT_ON_ROWS or (layer == "tok_embeddings" and embedding_split == "rows"):
        dim = 0
    elif layer in SPLIT_ON_COLUMNS or layer == "tok_embeddings":
        dim = 1
    else:
        return tensor.clone()
    size, rest = divmod(tensor.shape[dim], model_parallel)
    if rest:
        raise ValueError(f"{name} {tuple(tensor.shape)} cannot be cut into {model_parallel} along dim {dim}")
    return tensor.narrow(dim, rank * size, size).clone()
