"""One of several processes that take a step of a spread model; prints what it sent: kind → [calls, numbers] (test_lora.py, test_layouts.py)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunelib.adapters import add_adapters
from tunelib.config.schema import ActivationCheckpoint, Comm, Lora, Model, Parallelism, Training
from tunelib.formats.load import find_weights, give_weights
from tunelib.model.decoder import build_on_meta
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.runtime import leave, run_main, start

KINDS = {part: kind for kind in ("all_gather", "reduce_scatter", "all_reduce") for part in (kind, kind.replace("_", ""))}


class Traffic(TorchDispatchMode):
    """Counts collectives and the numbers of the larger side of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # to see what it does inside
        if func.namespace in ("c10d", "_c10d_functional") and not any(word in str(func) for word in ("wait_tensor", "_wrap_tensor")):
            kind = next((kind for part, kind in KINDS.items() if part in str(func)), str(func))
            entry = self.sent.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += max(value.numel() for arg in args for value in (arg if isinstance(arg, list) else [arg]) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def main(words: list[str]) -> None:
    folder, layout_fields, lora_fields = words
    section, lora = Parallelism(**json.loads(layout_fields)), Lora(**json.loads(lora_fields))
    with start(Training(), Comm()) as runtime:
        weights = find_weights(Model(), folder, 0, 0)
        model = build_on_meta(weights.config, runtime.param_dtype)
        if lora.enable:
            add_adapters(model, lora)
        spread_model(model, section, ActivationCheckpoint(), build_layout(section, runtime), runtime)
        give_weights(model, weights, seed=0)
        tokens = torch.arange(32)[None]
        with Traffic() as traffic:
            model(tokens, tokens, (32,), labels=tokens).backward()
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad and parameter.grad is not None]
        assert not frozen, frozen
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(json.dumps({"sent": traffic.sent, "trained": trained, "all": sum(parameter.numel() for parameter in model.parameters())}), flush=True)


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
