"""What would make a plan fit that needs too much memory: each change is estimated, none guessed."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tunelib.errors import ConfigError
from tunelib.parallel.estimate import Estimate, Plan, estimate_memory

TIMES = 3
"""How often GPUs are doubled, or rows halved."""


@dataclass(frozen=True)
class Change:
    """A plan, and the words that make it from the one that was asked for."""

    words: str
    plan: Plan

    def further(self, words: str, plan: Plan) -> "Change":
        """One more change on top."""
        return Change(f"{self.words} {words}".strip(), plan)


def find_changes(estimate: Estimate, limit_bytes: int, most: int = 3) -> Iterator[tuple[str, Estimate]]:
    """Changes with which a plan fits, as words and what it needs then: of each kind the smallest, those that leave training as it is first.

    These are another sharing, smaller micro-batches, activations worked out again, and the last two together. Then, together with both if
    nothing has fitted so far, more GPUs, and adapters. Where nothing has, rows become shorter, at last with all of these at once.
    """
    start = Change("", estimate.plan)
    least = _least(start)
    state_fits = estimate.peak.parameters + estimate.peak.optimizer <= limit_bytes  # which the next kinds leave as it is
    found: list[str] = []

    def look(*kinds: Iterable[Change]) -> Iterator[tuple[str, Estimate]]:
        for changes in kinds:
            fits = _find_smallest(changes, limit_bytes) if len(found) < most else None
            if fits is not None:
                found.append(fits[0])
                yield fits

    yield from look(_share(start))
    if state_fits:
        yield from look(_smaller_batches(start), _recompute(start))
    if state_fits and not found:
        yield from look([least])
    base = start if found else least
    yield from look(_more_gpus(base), _adapters(base))
    if state_fits and not found:
        yield from look(_shorter_rows(base))
    if not found:
        for kind in (_more_gpus, _adapters):
            base = [base, *kind(base)][-1]
        yield from look([base, *_shorter_rows(base)])


def _find_smallest(changes: Iterable[Change], limit_bytes: int) -> tuple[str, Estimate] | None:
    """The first that fits of changes that save more and more; the last is asked first, as others fit only if it does."""
    left = list(changes)
    fits: tuple[str, Estimate] | None = None
    while left and fits is None:
        greatest = left.pop()
        with contextlib.suppress(ConfigError):  # it does not go with the rest of the plan
            fits = greatest.words, estimate_memory(greatest.plan)
    if fits is None or fits[1].peak.total > limit_bytes:
        return None
    for change in left:
        smaller = estimate_memory(change.plan)
        if smaller.peak.total <= limit_bytes:
            return change.words, smaller
    return fits


def _least(change: Change) -> Change:
    """With the smallest micro-batches, and all activations worked out again."""
    for kind in (_smaller_batches, _recompute):
        for smallest in list(kind(change))[-1:]:
            change = smallest
    return change


def _share(change: Change) -> Iterator[Change]:
    section = change.plan.parallelism
    if section.fsdp_reshard_after_forward == "never":
        freed = replace(section, fsdp_reshard_after_forward="always")
        yield change.further("--parallelism.fsdp_reshard_after_forward always", replace(change.plan, parallelism=freed))
    if section.data_parallel_replicate_degree > 1:
        shared = replace(section, data_parallel_replicate_degree=1, data_parallel_shard_degree=-1)
        words = "--parallelism.data_parallel_replicate_degree 1 --parallelism.data_parallel_shard_degree -1"
        yield change.further(words, replace(change.plan, parallelism=shared))


def _smaller_batches(change: Change) -> Iterator[Change]:
    """Of sizes that divide what a rank has of a batch; the batch stays as it is."""
    plan = change.plan
    for rows in range(plan.rows - 1, 0, -1):
        if plan.rows * plan.micro_batches % rows == 0:
            yield change.further(f"--training.local_batch_size {rows}", replace(plan, training=replace(plan.training, local_batch_size=rows)))


def _recompute(change: Change) -> Iterator[Change]:
    section = change.plan.activation_checkpoint
    if section.mode == "none":
        selective = replace(section, mode="selective", selective_ac_option="op")
        yield change.further("--activation_checkpoint.mode selective", replace(change.plan, activation_checkpoint=selective))
    if section.mode != "full":
        yield change.further("--activation_checkpoint.mode full", replace(change.plan, activation_checkpoint=replace(section, mode="full")))


def _more_gpus(change: Change) -> Iterator[Change]:
    """Sharing the batch, or where it does not divide so far, the rows."""
    plan = change.plan
    for factor in (2**number for number in range(1, TIMES + 1)):
        section, words = plan.parallelism, f"--ngpu {plan.world_size * factor}"
        unit = 1 if plan.training.local_batch_size == -1 else plan.training.local_batch_size
        if plan.training.global_batch_size % (plan.num_data_ranks * factor * unit):
            section = replace(section, context_parallel_degree=section.context_parallel_degree * factor)
            words += f" --parallelism.context_parallel_degree {section.context_parallel_degree}"
        elif section.data_parallel_shard_degree != -1:
            section = replace(section, data_parallel_shard_degree=section.data_parallel_shard_degree * factor)
            words += f" --parallelism.data_parallel_shard_degree {section.data_parallel_shard_degree}"
        yield change.further(words, replace(plan, world_size=plan.world_size * factor, parallelism=section))


def _adapters(change: Change) -> Iterator[Change]:
    """Beside frozen weights in bfloat16, then in four bits."""
    plan = change.plan
    if not plan.lora.enable:
        halved = replace(plan.training, dtype="bfloat16")
        change = change.further("--lora.enable --training.dtype bfloat16", replace(plan, lora=replace(plan.lora, enable=True), training=halved))
        yield change
    if plan.lora.quantize_base == "none":
        quantised = replace(change.plan.lora, quantize_base="nf4")
        yield change.further("--lora.quantize_base nf4", replace(change.plan, lora=quantised))


def _shorter_rows(change: Change) -> Iterator[Change]:
    """Which changes training: longer documents are cut."""
    for width in (change.plan.training.seq_len >> number for number in range(1, TIMES + 1)):
        if width:
            shorter = replace(change.plan.training, seq_len=width)
            yield change.further(f"--training.seq_len {width}", replace(change.plan, training=shorter))
