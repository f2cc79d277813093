"""The matrix products that a training step cannot do without, counted in floating-point operations.

A product of (m, k) and (k, n) takes 2 m k n. What is recomputed, what is done for padding, masked keys or untrained positions, and
everything that is no matrix product is left out: whoever skips work is not credited with it, and whoever does more is not either.
"""

from collections.abc import Sequence

from tunelib.model.config import ModelConfig


def layer_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of each linear layer of a decoder layer: q, k, v, o, gate, up, down; or q, k and v as one, and gate and up."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if config.fused_projections:
        return [(hidden, q_size + 2 * kv_size), (q_size, hidden), (hidden, 2 * inner), (inner, hidden)]
    return [(hidden, q_size), (hidden, kv_size), (hidden, kv_size), (q_size, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]


def step_flops(config: ModelConfig, document_lengths: Sequence[int], num_trained: int, lora_rank: int = 0) -> int:
    """Of the forward and backward pass over whole documents.

    Args:
        document_lengths: in tokens.
        num_trained: tokens whose loss is taken; the head, and what the last layer does after attention, are needed there alone.
        lora_rank: of adapters on all linear layers, whose base has no weight gradients; 0 for full training.
    """
    num_tokens, matrices = sum(document_lengths), layer_matrices(config)
    num_before = 1 if config.fused_projections else 3  # of attention: q, k and v
    counts = [num_tokens] * (len(matrices) * (config.num_hidden_layers - 1) + num_before) + [num_trained] * (len(matrices) - num_before)
    passes = 2 if lora_rank else 3  # forward, gradients of inputs, and of weights
    linear = adapters = 0
    for count, (inputs, outputs) in zip(counts, matrices * config.num_hidden_layers, strict=True):
        linear += 2 * count * inputs * outputs * passes
        adapters += 2 * count * lora_rank * (inputs + outputs) * 3
    # Queries with keys and probabilities with values, of which causality leaves half, and a window less; in the backward pass each has two gradients.
    windows = config.windows or (0,) * config.num_hidden_layers
    seen = sum(length**2 - max(0, length - (window or length)) ** 2 for window in windows for length in document_lengths)
    attention = 2 * seen * config.num_attention_heads * config.head_dim * 3
    head = 2 * num_trained * config.hidden_size * config.vocab_size * passes
    return linear + adapters + attention + head
