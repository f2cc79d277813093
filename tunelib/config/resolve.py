"""Values that follow from the settings and the world size; what the user wrote is never changed."""

import os
from pathlib import Path

from tunelib.config.schema import Config, Parallelism, Training

LARGEST_AUTOMATIC_BATCH = 8
ONE_STAGE_EACH = ("1F1B", "GPipe")
"""Schedules with which a process has one stage."""
TWO_BACKWARD_PASSES = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that work out gradients of inputs first, and those of parameters later."""
BOTH_ENDS = ("ZBVZeroBubble", "DualPipeV")
"""Schedules with which the first process has the first and the last stage, the second those next to them, and so on."""


def resolve_dump_folder(config: Config) -> Path:
    """The run folder, absolute: ``job.dump_folder``, or ./outputs/<name of the config file>."""
    stem = os.path.basename(config.job.config_file).removesuffix(".toml")
    return Path(os.path.abspath(config.job.dump_folder or os.path.join("outputs", stem or "run")))


def resolve_shard_degree(parallelism: Parallelism, world_size: int) -> int:
    """Processes over which parameters are sharded; -1 takes all that the other degrees leave (rounded down)."""
    if parallelism.data_parallel_shard_degree != -1:
        return parallelism.data_parallel_shard_degree
    others = (
        parallelism.data_parallel_replicate_degree
        * parallelism.tensor_parallel_degree
        * parallelism.pipeline_parallel_degree
        * parallelism.context_parallel_degree
    )
    return max(world_size // others, 1)


def resolve_data_ranks(parallelism: Parallelism, world_size: int) -> int:
    """Processes that each read a share of the global batch."""
    return parallelism.data_parallel_replicate_degree * resolve_shard_degree(parallelism, world_size)


def resolve_local_batch_size(training: Training, parallelism: Parallelism, world_size: int) -> int:
    """Rows of a micro-batch; -1 becomes the largest divisor of a process's share that is at most 8, or 1 in a pipeline."""
    if training.local_batch_size != -1:
        return training.local_batch_size
    if parallelism.pipeline_parallel_degree > 1:
        return 1
    share = training.global_batch_size // resolve_data_ranks(parallelism, world_size)
    return next(size for size in range(min(share, LARGEST_AUTOMATIC_BATCH), 0, -1) if share % size == 0)


def resolve_reshard(parallelism: Parallelism) -> bool:
    """Whether parameters that were gathered for a forward pass are freed after it."""
    chosen = parallelism.fsdp_reshard_after_forward
    return parallelism.pipeline_parallel_degree == 1 if chosen == "default" else chosen == "always"


def find_what_rules_out_compile(config: Config) -> tuple[str, str]:
    """The key that compiled layers cannot be had with, and why; two empty texts for none."""
    parallelism, recompute = config.parallelism, config.activation_checkpoint
    if parallelism.pipeline_parallel_degree > 1 and parallelism.pipeline_parallel_schedule in TWO_BACKWARD_PASSES:
        why = f"{parallelism.pipeline_parallel_schedule} works out gradients of inputs first, which compiled layers cannot"
        return "parallelism.pipeline_parallel_schedule", why
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        return "activation_checkpoint.selective_ac_option", "which operators of a compiled layer are kept is the compiler's choice"
    return "", ""


def resolve_num_stages(parallelism: Parallelism) -> int:
    """Stages of the pipeline, over all its processes."""
    if parallelism.pipeline_parallel_split_points:
        return len(parallelism.pipeline_parallel_split_points) + 1
    return parallelism.pipeline_parallel_degree * (1 if parallelism.pipeline_parallel_schedule in ONE_STAGE_EACH else 2)
