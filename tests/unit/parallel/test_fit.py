"""Changes that make a plan fit: found smallest first, and true."""

from dataclasses import replace

import pytest
from unit.samples import TINY_FIELDS

from tunelib.config.schema import Parallelism, Training
from tunelib.model.families import parse_config
from tunelib.parallel.estimate import Plan, estimate_memory
from tunelib.parallel.fit import find_changes

MODEL = replace(
    parse_config(TINY_FIELDS, "tiny"),
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    num_hidden_layers=3,
)
PLAN = Plan(MODEL, 2, "cpu", Training(seq_len=256, global_batch_size=16, local_batch_size=8))


def test_gentle_changes_come_first_and_each_is_the_smallest_of_its_kind() -> None:
    estimate = estimate_memory(PLAN)
    found = list(find_changes(estimate, estimate.peak.total - 1))
    assert [words for words, _ in found] == [
        "--training.local_batch_size 4",
        "--activation_checkpoint.mode selective",
        "--ngpu 4 --parallelism.context_parallel_degree 2",
    ]
    for _, fits in found:
        assert fits.peak.total < estimate.peak.total
        assert estimate_memory(fits.plan) == fits


def test_both_are_tried_together_where_neither_is_enough() -> None:
    estimate = estimate_memory(PLAN)
    singles = [
        replace(PLAN, training=replace(PLAN.training, local_batch_size=1)),
        replace(PLAN, activation_checkpoint=replace(PLAN.activation_checkpoint, mode="full")),
    ]
    limit = min(estimate_memory(plan).peak.total for plan in singles) - 1
    words, _ = next(find_changes(estimate, limit))
    assert words == "--training.local_batch_size 1 --activation_checkpoint.mode full"


def test_sharing_comes_before_all() -> None:
    estimate = estimate_memory(replace(PLAN, parallelism=Parallelism(data_parallel_replicate_degree=2)))
    words, _ = next(find_changes(estimate, estimate.peak.total - 1))
    assert words == "--parallelism.data_parallel_replicate_degree 1 --parallelism.data_parallel_shard_degree -1"


@pytest.mark.slow
def test_more_gpus_share_the_batch_where_it_divides() -> None:
    deep = replace(MODEL, num_hidden_layers=12, vocab_size=64)  # most of its memory is state
    training = replace(PLAN.training, local_batch_size=-1, seq_len=8)
    plan = replace(PLAN, model=deep, training=training, parallelism=Parallelism(data_parallel_shard_degree=2))
    estimate = estimate_memory(plan)
    found = [words for words, _ in find_changes(estimate, estimate.peak.parameters + estimate.peak.optimizer - 1)]
    gentle = "--training.local_batch_size 1 --activation_checkpoint.mode full"
    assert found == [f"{gentle} --ngpu 4 --parallelism.data_parallel_shard_degree 4", f"{gentle} --lora.enable --training.dtype bfloat16"]


@pytest.mark.slow
def test_nothing_is_found_where_nothing_fits() -> None:
    assert list(find_changes(estimate_memory(PLAN), 1000)) == []
