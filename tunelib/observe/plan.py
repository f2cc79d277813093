"""What a planned run will need, in the words of a report: memory, tokens and steps, checkpoints on the disk."""

import math
import shutil

import torch

from tunelib.config import Config, resolve_dump_folder
from tunelib.parallel.estimate import Estimate
from tunelib.parallel.runtime import resolve_dtypes

GIB = 2**30


def plan_lines(config: Config, estimate: Estimate) -> list[str]:
    """A plan and what it needs, in some lines; sizes are in GiB."""
    plan, training = estimate.plan, config.training
    param, compute, _ = (str(dtype).removeprefix("torch.") for dtype in resolve_dtypes(training, torch.device(plan.device)))
    dtypes = f"{param} parameters" + (f", {compute} compute" if compute != param else "")
    tokens = training.global_batch_size * training.seq_len
    batches = f"{plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''} of {plan.rows} × {training.seq_len:,} on each data rank"
    steps = f"{training.steps:,} steps, {training.steps * tokens:,} tokens" if training.steps else "as many steps as training.epochs takes"
    return [
        f"model       {estimate.parameters / 1e6:,.1f} M parameters, of which {estimate.trained / 1e6:,.1f} M are trained",
        f"machine     {plan.world_size} × {plan.device}, {estimate.layout}, {dtypes}",
        f"run         {steps}; {tokens:,} tokens a step: {batches}",
        f"peak        {estimate.peak.total / GIB:.2f} GiB on rank {estimate.rank}, in the {estimate.moment}",
        *(f"            {size / GIB:8.2f} {name}" for name, size in estimate.peak.parts().items()),
        *([f"resident    about {estimate.resident_bytes / GIB:.2f} GiB, with the gaps of the heap"] if plan.device == "cpu" else []),
        f"checkpoint  {describe_checkpoints(config, estimate.checkpoint_bytes)}",
    ]


def describe_checkpoints(config: Config, size: int) -> str:
    """What one takes, and all that will lie there at once, against what is free; the export at the end comes on top.

    Args:
        size: of one, in bytes.
    """
    section, folder = config.checkpoint, resolve_dump_folder(config)
    if not section.enable_checkpoint:
        return f"{size / GIB:.2f} GiB, but none is saved: checkpoint.enable_checkpoint is false"
    saved = [math.ceil(config.training.steps / section.interval)] if section.interval_type == "steps" and config.training.steps else []
    for_good = (config.training.steps or 0) // math.lcm(section.keep_every_n, section.interval) if section.keep_every_n and saved else 0
    is_bounded = section.keep_latest_k and (saved or not section.keep_every_n)
    kept = [section.keep_latest_k + 1 + section.keep_best + for_good] if is_bounded else []  # the oldest goes when the newest is whole
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    place = f"{free / GIB:,.1f} GiB are free for {folder}"
    if not saved and not kept:
        return f"{size / GIB:.2f} GiB each, and all are kept; {place}"
    most = min(saved + kept)
    verdict = "enough" if most * size <= free else "NOT ENOUGH; keep fewer with checkpoint.keep_latest_k"
    return f"{size / GIB:.2f} GiB each, {most} at once at most: {most * size / GIB:,.1f} GiB; {place}: {verdict}"
