"""One of two processes that take a step with adapters; prints what was sent between them (test_lora.py)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunelib.adapters import add_adapters
from tunelib.config.schema import Comm, Lora, Model, Parallelism, Training
from tunelib.formats.load import find_weights, give_weights
from tunelib.model.decoder import build_on_meta
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.runtime import leave, run_main, start


class Traffic(TorchDispatchMode):
    """Counts the numbers of every reduce-scatter's input."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "reduce_scatter" in str(func):
            self.reduced += max(value.numel() for value in args if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def main(words: list[str]) -> None:
    folder, rank, port = words
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with start(Training(), Comm()) as runtime:
        weights = find_weights(Model(), folder, 0, 0)
        model = build_on_meta(weights.config, runtime.param_dtype)
        add_adapters(model, Lora(enable=True, rank=4))
        spread_model(model, Parallelism(), build_layout(Parallelism(), runtime), runtime)
        give_weights(model, weights, seed=0)
        tokens = torch.arange(32)[None]
        with Traffic() as traffic:
            model(tokens, tokens, (32,), labels=tokens).backward()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad and parameter.grad is not None]
        print(f"reduced {traffic.reduced} trained {trained} frozen gradients {len(frozen)}", flush=True)


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
