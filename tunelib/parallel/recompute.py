"""Activations that are worked out again in the backward pass instead of being kept (Chen et al. 2016)."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tunelib.config.schema import ActivationCheckpoint
from tunelib.model.decoder import Decoder

PER_OPERATOR = "op"
# Dear to work out again; what is left is elementwise.
KEPT = frozenset({torch.ops.tunelib.document_attention.default}) | frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_cudnn_attention",
    )
)


def apply_recompute(model: Decoder, section: ActivationCheckpoint) -> None:
    """Have layers of a model keep their inputs only ("full"), every n-th of them, or all of them their matrix products and attention too ("op")."""
    if section.mode == "none":
        return
    contexts: dict[str, Any] = {}
    every = 1
    if section.mode == "selective" and section.selective_ac_option == PER_OPERATOR:
        contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)}
    elif section.mode == "selective":
        every = int(section.selective_ac_option)
    for number, layer in model.model.layers.items():
        if int(number) % every == 0:
            # In place of the module's own forward, so that parameters keep their names and FSDP's hooks stay outside.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def _keep_products(_context: Any, operator: Any, *_words: Any, **_more: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
