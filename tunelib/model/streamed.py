"""The model's logits with one layer in memory at a time, for weights that are read when they are needed.

S sequence, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tunelib.model.attention import plan_documents
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import DecoderLayer, scaled
from tunelib.model.families import family_of
from tunelib.model.form import form_of
from tunelib.model.loss import capped
from tunelib.model.norm import build_norm
from tunelib.model.rope import rope_tables

BLOCK_ELEMENTS = 1 << 24


@torch.no_grad()
def streamed_logits(config: ModelConfig, read: Callable[[str, tuple[slice, ...]], Tensor], tokens: list[int]) -> Tensor:
    """Logits (S, V) of one document, in float32 on the CPU. No more than one layer's weights are held.

    Args:
        read: gives a weight by its Hugging Face name, or its part.
    """
    family, ids = family_of(config), torch.tensor(tokens)
    x = torch.empty(len(tokens), config.hidden_size)
    for first, rows in _read_blocks(config, read, family.embedding):
        here = (ids >= first) & (ids < first + len(rows))
        x[here] = rows[ids[here] - first]
    x = scaled(config, x)[None]  # (1, S, hidden)
    rope = rope_tables(config, torch.arange(len(tokens))[None], x.dtype)
    documents = plan_documents((len(tokens),), x, config.head_dim, config.windows, config.attention_softcap)
    layer = DecoderLayer(config, 0)
    for number in range(config.num_hidden_layers):
        layer.form = form_of(config, number)
        for name, parameter in layer.named_parameters():
            parameter.copy_(read(f"model.layers.{number}.{name}", ()))
        x = layer(x, rope, documents)
    norm = build_norm(config, config.hidden_size)
    norm.weight.copy_(read("model.norm.weight", ()))
    x = norm(x)[0]
    head = family.embedding if config.tie_word_embeddings else family.head
    return capped(torch.cat([x @ rows.T for _, rows in _read_blocks(config, read, head)], dim=1), config.final_softcap)


def _read_blocks(config: ModelConfig, read: Callable[[str, tuple[slice, ...]], Tensor], name: str) -> Iterator[tuple[int, Tensor]]:
    """Blocks of an embedding's rows in float32, each with the number of its first row."""
    step = max(1, BLOCK_ELEMENTS // config.hidden_size)
    for first in range(0, config.vocab_size, step):
        yield first, read(name, (slice(first, min(first + step, config.vocab_size)),)).float()
