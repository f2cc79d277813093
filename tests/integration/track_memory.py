"""One of several processes that take train.py's step on real tensors, plan by plan, under torch's own memory tracker; prints each peak as
kind → bytes (test_estimate_measured.py, benchmarks/estimate_memory.py)."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed._tools.mem_tracker import MemTracker

import train
from tunelib.adapters import add_adapters
from tunelib.batch import Batch
from tunelib.config import resolve_data_ranks, resolve_local_batch_size
from tunelib.config.schema import ActivationCheckpoint, Comm, Lora, Model, Optimizer, Parallelism, Training
from tunelib.data.loader import Step
from tunelib.formats.load import find_weights, give_lengths_of_cut_rows, give_weights
from tunelib.model.decoder import build_on_meta
from tunelib.optimizer import build_optimizer
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.pipeline import plan_stages
from tunelib.parallel.runtime import Runtime, leave, resolve_dtypes, run_main, start


class Tracker(MemTracker):
    """torch's tracker, which would put hooks for gradients on frozen parameters too, and fail."""

    def _track_module_params_and_buffers(self, module: torch.nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        has_frozen = not all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and not has_frozen)


def track(given: dict[str, Any], runtime: Runtime) -> dict[str, int]:
    """Bytes by kind at the peak of a plan's second step."""
    training, section = Training(**given["training"]), Parallelism(**given.get("parallelism", {}))
    lora = Lora(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.get("lora", {}).items()})
    runtime = Runtime(runtime.rank, runtime.world_size, runtime.device, *resolve_dtypes(training, runtime.device))
    layout = build_layout(section, runtime)
    weights = find_weights(Model(**given["model"]), "", 0, training.seq_len)
    model = build_on_meta(weights.config, runtime.param_dtype)
    if lora.enable:
        add_adapters(model, lora)
    stages = plan_stages(model, section, training.seq_len)
    spread_model(model, section, ActivationCheckpoint(**given.get("activation_checkpoint", {})), layout, runtime, stages)
    give_weights(model, weights, seed=0)
    give_lengths_of_cut_rows(model, runtime.compute_dtype)
    optimizer = build_optimizer(model, Optimizer(**given.get("optimizer", {})))
    ranks = resolve_data_ranks(section, runtime.world_size)
    rows, width = resolve_local_batch_size(training, section, runtime.world_size), training.seq_len
    tokens = torch.arange(width).expand(rows, width).contiguous()
    batch = Batch(tokens, tokens.clone(), tokens.clone(), (width,) * rows)
    num_tokens = training.global_batch_size * width
    work = Step(1, [batch] * (training.global_batch_size // (ranks * rows) if stages else 1), num_tokens, num_tokens, 0.0)
    train.train_step(model, optimizer, work, 1e-3, 1.0, runtime, layout)  # the first makes the optimizer's state
    if training.global_batch_size > ranks * rows and not stages:  # a later micro-batch meets the gradients of the first
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    tracker = Tracker()
    tracker.track_external(model, optimizer, batch.tokens, batch.positions, batch.labels)
    with tracker:
        train.train_step(model, optimizer, work, 1e-3, 1.0, runtime, layout)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(kind, "value", kind)): size for kind, size in peak.items()}


def main(words: list[str]) -> None:
    with start(Training(), Comm()) as runtime:
        print(json.dumps([track(given, runtime) for given in json.loads(words[0])]), flush=True)


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
