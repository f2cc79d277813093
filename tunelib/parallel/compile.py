"""Layers compiled by torch.compile: elementwise work is fused, products stay what they are.

Attention is left out: what it does depends on where documents end, and each micro-batch would be compiled anew. So a layer is two graphs,
before and after it, the same for all layers; and work that is to be done again in the backward pass runs them again.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from tunelib.config.schema import Optimizer
from tunelib.errors import ConfigError
from tunelib.model.decoder import Decoder, DecoderLayer
from tunelib.optimizer import load_adamw8bit

FLOPS_PER_THREAD = 60e9
"""What a thread of a CPU may do in a second; only the order of magnitude counts here."""
WORTH_COMPILING_SECONDS = 1800.0
"""A run on a CPU that is shorter does not surely win back the minute that compiling takes where nothing is in torch's cache."""


@dataclass(frozen=True)
class Choice:
    """Whether layers are compiled, and why."""

    compiled: bool
    why: str


def choose_compile(told: bool | None, ruled_out_by: str, device: torch.device, compiled_before: bool | None, flops: float) -> Choice:
    """Whether layers are compiled: as told; or as the run did before; or else on CUDA, and on a CPU where the run is long.

    Args:
        told: compile.enable.
        ruled_out_by: a setting; empty for none.
        compiled_before: what a checkpoint says that is resumed from; None for a fresh run.
        flops: that this process needs for the whole run.

    Raises:
        ConfigError: they are to be, since the user says so or the run began so, and nothing here can compile.
    """
    if told is not None:
        return _able(Choice(told, f"compile.enable = {str(told).lower()}"), device)
    if ruled_out_by:
        return Choice(False, f"{ruled_out_by} rules it out")
    if compiled_before is not None:
        return _able(Choice(compiled_before, f"the run that is resumed was{'' if compiled_before else ' not'} compiled"), device)
    hours = flops / FLOPS_PER_THREAD / torch.get_num_threads() / 3600
    if device.type == "cpu" and hours * 3600 < WORTH_COMPILING_SECONDS:
        return Choice(False, f"a run of about {max(1, round(hours * 60))} min would not surely win it back")
    if missing := _find_missing(device):
        return Choice(False, missing)
    return Choice(True, "on a GPU" if device.type == "cuda" else f"a run of about {hours:.1f} hours wins it back")


def check_compiled_step(section: Optimizer, device: torch.device) -> None:
    """Whether torchao and a compiler are here, where the optimizer's step is compiled.

    Raises:
        ConfigError: one is not.
    """
    if section.name != "AdamW8bit":
        return
    load_adamw8bit()
    if missing := _find_missing(device):
        raise ConfigError(f"optimizer.name = AdamW8bit: its step is compiled, and {missing}; take AdamW")


def _able(choice: Choice, device: torch.device) -> Choice:
    if choice.compiled and (missing := _find_missing(device)):
        raise ConfigError(f"{choice.why}: {missing}; install it, or set compile.enable = false")
    return choice


def _find_missing(device: torch.device) -> str:
    """What torch.compile lacks here; empty for nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs the package triton on a GPU, which is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler such as g++, and finds none"
    return ""


def apply_compile(model: Decoder) -> None:
    """Compile each layer at its first call in a training step. What cannot be compiled then is an error, never a layer that runs without.

    Without gradients, for validation and for samples with their growing rows, layers run as they are; so does what the last layer does to positions
    that are taken out of rows, of which each micro-batch has another number.

    Graphs are given plain tensors: a graph that takes or gives a DTensor, or a tensor that a collective has yet to bring, passed no
    gradient on, or a wrong one, and said nothing (torch 2.13).
    """
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # What a norm or SwiGLU gives is worked out again in the backward pass, though products need it there: 6 per cent less memory, as fast.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for layer in model.model.layers.values():
        assert isinstance(layer, DecoderLayer)
        layer.begin = functools.partial(_run, layer.begin, torch.compile(layer.begin, fullgraph=True))  # type: ignore[method-assign]
        layer.finish = functools.partial(_run, layer.finish, torch.compile(layer.finish, fullgraph=True))  # type: ignore[method-assign]


def _run(plain: Callable[..., Any], compiled: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled() or inputs[0].dim() == 2:
        return plain(*inputs)
    return compiled(*(one.clone() if isinstance(one, AsyncCollectiveTensor) else one for one in inputs))
