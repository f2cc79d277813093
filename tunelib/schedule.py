"""The learning rate of each step: a pure function, so that there is no state to save."""

import math

from tunelib.config.schema import LrScheduler


def lr_factor(section: LrScheduler, step: int, num_steps: int) -> float:
    """Share of optimizer.lr used in a step.

    Args:
        step: counted from 1.
        num_steps: of the whole run.

    Warmup rises from 1/warmup_steps to 1. The decay takes the last ``decay_ratio`` of the run, or all that follows warmup, and
    would reach ``min_lr_factor`` one step after the run, so that no step is spent at a rate of 0.
    """
    if step <= section.warmup_steps:
        return step / section.warmup_steps
    if section.decay_type == "constant":
        return 1.0
    after_warmup = max(num_steps - section.warmup_steps, 0)
    num_decay = after_warmup if section.decay_ratio is None else min(max(round(section.decay_ratio * num_steps), 1), after_warmup)
    progress = (step - (num_steps - num_decay)) / (num_decay + 1)
    if progress <= 0:
        return 1.0
    shape = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "sqrt": 1 - math.sqrt(progress)}
    return section.min_lr_factor + (1 - section.min_lr_factor) * shape[section.decay_type]
