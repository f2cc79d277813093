"""The opening lines of a run."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from tunelib.config.schema import Config
from tunelib.data.index import Index
from tunelib.data.loader import TrainData
from tunelib.parallel.compile import Choice
from tunelib.parallel.mesh import Layout
from tunelib.parallel.runtime import Runtime

ENTROPY_TOKENS = 1 << 24


def unigram_entropy(index: Index, documents: np.ndarray) -> float:
    """Entropy in nats per token of the trained labels' frequencies in documents: the loss of the best model that sees no context."""
    counts = np.zeros(1, dtype=np.int64)
    lengths = np.cumsum(index.lengths[documents])
    for block in np.split(documents, np.searchsorted(lengths, np.arange(1 << 20, lengths[-1], 1 << 20))):
        if len(block):
            labels = np.concatenate([marked[1:] for marked in index.read_row(block)])
            added = np.bincount(labels[labels >= 0], minlength=len(counts))
            added[: len(counts)] += counts
            counts = added
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def describe_documents(data: TrainData) -> str:
    """The documents that a run trains on, in a line; the entropy is that of an epoch, or of its beginning where it is long."""
    index, documents = data.index, data.documents_of_epoch(0)
    num_tokens = int(index.lengths.sum())
    share = 100 * index.num_trained.sum() / num_tokens
    looked_at = documents[: max(1, int(np.searchsorted(np.cumsum(index.lengths[documents]), ENTROPY_TOKENS)))]
    of_what = "unigram entropy" if len(looked_at) == len(documents) else f"unigram entropy of {ENTROPY_TOKENS / 1e6:.0f} M tokens"
    return f"{len(index):,} documents, {num_tokens:,} tokens, {share:.0f}% trained; {of_what} {unigram_entropy(index, looked_at):.3f} nats"


def opening_lines(
    config: Config,
    runtime: Runtime,
    layout: Layout,
    compiled: Choice,
    stages: tuple[range, ...],
    trained: dict[str, torch.Size],
    num_parameters: int,
    data_lines: list[str],
    num_steps: int,
    weights: str,
    notes: tuple[str, ...],
) -> list[str]:
    """What is about to happen, in a few lines.

    Args:
        compiled: whether layers are, and why.
        stages: the layers of each stage of a pipeline.
        trained: the shapes of the parameters that are trained.
        num_parameters: of the model, without adapters.
        notes: what the form of the export cannot hold.
    """
    num_trained = sum(shape.numel() for shape in trained.values())
    adapters = [f"adapters   {line}" for line in describe_adapter(config, num_trained, num_parameters)] if config.lora.enable else []
    training = config.training
    processes = f"{runtime.world_size} process{'es' if runtime.world_size > 1 else ''} on {runtime.device.type}"
    dtypes = f"{runtime.param_dtype} parameters" + (f", {runtime.compute_dtype} compute" if runtime.compute_dtype != runtime.param_dtype else "")
    order = (
        f"stages     {config.parallelism.pipeline_parallel_schedule}, of layers {', '.join(f'{part[0]}–{part[-1]}' for part in stages)}"
        if stages
        else ""
    )
    step_too = "; besides, the step of AdamW8bit, which takes a minute the first time" if config.optimizer.name == "AdamW8bit" else ""
    return [
        *([config.job.description] if config.job.description else []),
        f"model      {num_parameters / 1e6:,.1f} M parameters; {weights}",
        *adapters,
        *(f"{'data' if line is data_lines[0] else '':10} {line}" for line in data_lines),
        f"machine    {processes}, {layout.sentence}, {dtypes.replace('torch.', '')}",
        f"compile    {'layers' if compiled.compiled else 'nothing'}: {compiled.why}{step_too}",
        *([order] if order else []),
        f"run        {num_steps:,} steps of {training.global_batch_size} rows of {training.seq_len} tokens",
        *(f"export     {note}" for note in notes),
    ]


def describe_adapter(config: Config, num_trained: int, num_parameters: int) -> list[str]:
    """Adapters in a few words.

    Args:
        num_parameters: of the model, without adapters.
    """
    section = config.lora
    kind = ("rs" if section.use_rslora else "") + ("DoRA" if section.use_dora else "LoRA")
    base = f", the base in {section.quantize_base}" if section.quantize_base != "none" else ""
    modules = ", ".join(dict.fromkeys(section.target_modules))
    share = f"{num_trained:,} parameters are trained ({num_trained / num_parameters:.2%} of the model's)"
    lines = [f"{kind} of rank {section.rank}, alpha {section.alpha:g}, on {modules}{base}; {share}"]
    if section.adapter_path:
        lines.append(f"begun from {section.adapter_path}")
    if not config.checkpoint.initial_load_path:
        lines.append("beside weights that nobody has trained: give checkpoint.initial_load_path the model that they are for")
    return lines


def process_age() -> float | None:
    """Seconds since this process began, imports and all; None where the system does not say (Linux does)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None
