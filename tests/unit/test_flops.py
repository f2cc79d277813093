"""What a step needs is what torch counts of the plain model, less what nobody needs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from unit.samples import tiny_model

from tunelib.adapters import add_adapters
from tunelib.batch import IGNORED
from tunelib.config.schema import Lora
from tunelib.flops import layer_matrices, step_flops


@pytest.mark.parametrize("num_trained", [8, 3])
@pytest.mark.parametrize("rank", [0, 3])
def test_needed_products_are_those_that_torch_counts(rank: int, num_trained: int) -> None:
    """But for attention, whose products are half of those of a whole matrix of scores, and what only the first layer can leave out."""
    model = tiny_model()
    config = model.config
    if rank:
        add_adapters(model, Lora(enable=True, rank=rank))
        model = model.to_empty(device="cpu")
    width = 8
    tokens, positions = torch.zeros(1, width, dtype=torch.int64), torch.arange(width)[None]
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -num_trained:] = 0
    with FlopCounterMode(display=False) as counter:
        model(tokens, positions, (width,), labels=labels).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(number for operator, number in counted.items() if "attention" not in str(operator))
    if rank:  # nothing is trained before the first layer: the gradients of what its q, k and v, and their adapters' A, take are not needed
        unneeded = sum(inputs * outputs + rank * inputs for inputs, outputs in layer_matrices(config)[:3])
        products += 2 * width * unneeded
    attention = 2 * width**2 * config.num_attention_heads * config.head_dim * 3 * config.num_hidden_layers
    assert step_flops(config, [width], num_trained, rank) == products + attention


def test_documents_attend_to_themselves_alone_and_what_follows_the_last_attention_is_needed_where_tokens_are_trained() -> None:
    config = tiny_model().config
    square = 2 * config.num_attention_heads * config.head_dim * 3 * config.num_hidden_layers
    assert step_flops(config, [8], 4) - step_flops(config, [5, 3], 4) == square * (64 - 25 - 9)
    last = config.hidden_size * (config.num_attention_heads * config.head_dim + 3 * config.intermediate_size)
    assert step_flops(config, [8], 4) - step_flops(config, [8], 3) == 2 * (last + config.hidden_size * config.vocab_size) * 3


def test_windows_and_fused_projections_are_counted() -> None:
    plain = tiny_model().config
    square = 2 * plain.num_attention_heads * plain.head_dim * 3
    in_windows = replace(plain, windows=(0, 3))
    assert step_flops(plain, [8], 4) - step_flops(in_windows, [8], 4) == square * (8 - 3) ** 2
    assert step_flops(in_windows, [3], 3) == step_flops(plain, [3], 3)
    fused = replace(plain, fused_projections=True)
    assert step_flops(fused, [8], 4) == step_flops(plain, [8], 4)
    assert step_flops(fused, [8], 4, lora_rank=2) < step_flops(plain, [8], 4, lora_rank=2)  # fewer matrices A
