"""What is exact in an estimate, and that nothing of it stays behind."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from unit.samples import TINY_FIELDS

from tunelib.config.schema import ActivationCheckpoint, Lora, Optimizer, Parallelism, Training
from tunelib.errors import ConfigError
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import parse_config
from tunelib.parallel.estimate import Plan, estimate_memory, ranks_to_look_at
from tunelib.quantize import dequantize, quantize

MODEL = replace(
    parse_config(TINY_FIELDS, "tiny"),
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
)
TRAINING = Training(seq_len=64, global_batch_size=8, local_batch_size=1)
NUM_PARAMETERS = sum(parameter.numel() for parameter in build_on_meta(MODEL, torch.float32).parameters())
NUM_TENSORS = len(list(build_on_meta(MODEL, torch.float32).parameters()))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_shards_of_parameters_and_state_are_exact(world_size: int) -> None:
    estimate = estimate_memory(Plan(MODEL, world_size, "cpu", TRAINING))
    shard = 4 * NUM_PARAMETERS // world_size
    assert estimate.peak.parameters == shard
    assert estimate.peak.optimizer == 2 * shard + 4 * NUM_TENSORS  # moments, and a count of steps each
    assert (estimate.parameters, estimate.trained) == (NUM_PARAMETERS, NUM_PARAMETERS)
    assert estimate.checkpoint_bytes == 12 * NUM_PARAMETERS + 4 * NUM_TENSORS  # whatever the layout


@pytest.mark.parametrize("world_size", [1, 8])
def test_moments_of_8_bits_are_counted_as_what_they_are(world_size: int) -> None:
    """A byte for each number, and a scale of four for every 64; those of norms stay in float32."""
    norms = MODEL.hidden_size * (2 * MODEL.num_hidden_layers + 1)
    moments = (NUM_PARAMETERS - norms) * 17 // 16 + 4 * norms
    peak = estimate_memory(Plan(MODEL, world_size, "cpu", TRAINING, optimizer=Optimizer(name="AdamW8bit"))).peak
    assert peak.optimizer == 2 * moments // world_size + 4 * NUM_TENSORS


def test_step_with_moments_of_8_bits_holds_two_copies_of_the_largest_matrix() -> None:
    wide = replace(MODEL, intermediate_size=2**17)  # so that the step decides the peak
    estimate = estimate_memory(Plan(wide, 1, "cpu", replace(TRAINING, seq_len=1), optimizer=Optimizer(name="AdamW8bit")))
    assert estimate.moment == "optimizer's step"
    assert estimate.peak.activations == pytest.approx(2 * 4 * 2**17 * MODEL.hidden_size, rel=0.01)


def test_copies_are_not_shared_and_parts_of_products_are() -> None:
    replicated = estimate_memory(Plan(MODEL, 4, "cpu", TRAINING, Parallelism(data_parallel_replicate_degree=2)))
    assert replicated.peak.parameters == 4 * NUM_PARAMETERS // 2
    split = estimate_memory(Plan(MODEL, 4, "cpu", TRAINING, Parallelism(tensor_parallel_degree=2)))
    norms = 4 * MODEL.hidden_size * (2 * MODEL.num_hidden_layers + 1)
    assert split.peak.parameters == (4 * NUM_PARAMETERS - norms) // 4 + norms // 2


def test_parts_add_up_and_have_no_gap() -> None:
    estimate = estimate_memory(Plan(MODEL, 2, "cuda", TRAINING))
    assert estimate.peak.total == sum(estimate.peak.parts().values())
    assert min(estimate.peak.parts().values()) >= 0
    assert list(estimate.peak.parts()) == ["parameters", "gathered", "gradients", "optimizer", "activations", "logits"]


def test_logits_are_those_of_some_tokens() -> None:
    """Of 1,024 at once, and no more: their gradient is formed in their place. That of the head is there with them, and is scaled in place."""
    wide = replace(MODEL, vocab_size=8192)  # so that the head decides the peak
    for rows, at_once in ((1, TRAINING.seq_len), (64, 1024)):
        estimate = estimate_memory(Plan(wide, 1, "cpu", replace(TRAINING, global_batch_size=rows, local_batch_size=rows)))
        numbers = at_once * wide.vocab_size + 2 * rows * TRAINING.seq_len * wide.hidden_size
        assert estimate.peak.logits == pytest.approx(4 * numbers, rel=0.02)
        assert estimate.peak.gradients == 4 * wide.vocab_size * wide.hidden_size


def test_gradients_stay_from_micro_batch_to_micro_batch() -> None:
    wide = replace(MODEL, vocab_size=8192)
    alone = estimate_memory(Plan(wide, 1, "cpu", replace(TRAINING, global_batch_size=1)))
    later = estimate_memory(Plan(wide, 1, "cpu", TRAINING))
    assert alone.peak.gradients == 4 * wide.vocab_size * wide.hidden_size  # the head's, at its peak, in the loss
    assert later.peak.gradients == later.peak.parameters
    assert later.plan.micro_batches == 8


def test_frozen_weights_have_neither_gradients_nor_state() -> None:
    estimate = estimate_memory(Plan(MODEL, 1, "cpu", TRAINING, lora=Lora(enable=True, rank=4)))
    assert estimate.peak.gradients == 4 * estimate.trained < 4 * NUM_PARAMETERS
    assert estimate.peak.optimizer < 9 * estimate.trained
    assert estimate.parameters == NUM_PARAMETERS + estimate.trained
    quantised = estimate_memory(Plan(MODEL, 1, "cpu", TRAINING, lora=Lora(enable=True, rank=4, quantize_base="nf4")))
    assert quantised.parameters == estimate.parameters
    assert quantised.peak.parameters < estimate.peak.parameters


def test_settings_save_what_they_are_for() -> None:
    def total(training: Training = TRAINING, world_size: int = 1, **sections: object) -> int:
        return estimate_memory(Plan(MODEL, world_size, "cpu", training, **sections)).peak.total  # type: ignore[arg-type]  # of the right kinds

    long = replace(TRAINING, seq_len=256, local_batch_size=2)
    assert total(long) > total(long, activation_checkpoint=ActivationCheckpoint("selective"))
    assert total(long, activation_checkpoint=ActivationCheckpoint("selective")) > total(long, activation_checkpoint=ActivationCheckpoint("full"))
    assert total(long) > total(replace(long, local_batch_size=1)) > total(replace(long, local_batch_size=1, seq_len=128))
    assert total() > total(optimizer=Optimizer(name="SGD"))
    assert total(world_size=8, training=long) < total(long, world_size=4)
    assert total(long, world_size=2, parallelism=Parallelism(context_parallel_degree=2)) < total(long, world_size=1)


def test_device_decides_data_types() -> None:
    cuda, cpu = (estimate_memory(Plan(MODEL, 1, device, TRAINING)).peak for device in ("cuda", "cpu"))
    assert cuda.activations + cuda.logits < cpu.activations + cpu.logits
    assert cuda.gathered > cpu.gathered == 0  # a copy in bfloat16 of each layer at work


def test_ranks_that_may_need_most_are_looked_at() -> None:
    assert ranks_to_look_at(Plan(MODEL, 8, "cpu", TRAINING)) == [0]
    assert ranks_to_look_at(Plan(MODEL, 8, "cpu", TRAINING, Parallelism(pipeline_parallel_degree=2, context_parallel_degree=2))) == [0, 1, 4, 5]
    assert ranks_to_look_at(Plan(MODEL, 8, "cpu", TRAINING, Parallelism(context_parallel_degree=2, tensor_parallel_degree=4))) == [0, 4]


@pytest.mark.parametrize(
    "schedule", ["1F1B", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GPipe", "Interleaved1F1B", "ZBVZeroBubble"))]
)
def test_stages_have_their_own_parameters_and_all_of_them_are_saved(schedule: str) -> None:
    deep = replace(MODEL, num_hidden_layers=8)
    section = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule=schedule)  # type: ignore[arg-type]
    estimate, whole = estimate_memory(Plan(deep, 2, "cpu", TRAINING, section)), estimate_memory(Plan(deep, 1, "cpu", TRAINING))
    assert 0.4 < estimate.peak.parameters / whole.peak.parameters < 0.6
    assert (estimate.parameters, estimate.trained) == (whole.parameters, whole.trained)
    assert estimate.checkpoint_bytes == pytest.approx(whole.checkpoint_bytes, rel=1e-3)


def test_stages_of_gpipe_keep_more_micro_batches_than_those_of_1f1b() -> None:
    deep = replace(MODEL, num_hidden_layers=4)
    kept = [
        estimate_memory(Plan(deep, 2, "cpu", TRAINING, Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule=schedule))).peak.total
        for schedule in ("1F1B", "GPipe")
    ]
    assert kept[0] < kept[1]


def test_offloaded_state_takes_no_memory_of_the_gpu() -> None:
    offloaded = estimate_memory(Plan(MODEL, 2, "cuda", replace(TRAINING, enable_cpu_offload=True))).peak
    assert (offloaded.parameters, offloaded.optimizer) == (0, 0)
    assert offloaded.gathered > 0


def test_levels_of_nf4_have_their_numbers_afterwards() -> None:
    estimate_memory(Plan(MODEL, 1, "cpu", TRAINING, lora=Lora(enable=True, rank=4, quantize_base="nf4")))
    weight = torch.randn(4, 64)
    assert (dequantize(quantize(weight), torch.float32) - weight).abs().mean() < 0.2


def test_nothing_stays_behind() -> None:
    resize, on_error = torch.UntypedStorage.resize_, sys.excepthook
    for degree in (2, 1, 4):  # groups of other layouts, which DTensor must have forgotten
        estimate_memory(Plan(MODEL, 4, "cpu", TRAINING, Parallelism(tensor_parallel_degree=degree)))
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree = 3 does not divide"):
        estimate_memory(Plan(MODEL, 3, "cpu", replace(TRAINING, global_batch_size=3), Parallelism(tensor_parallel_degree=3)))
    assert not dist.is_initialized()
    assert (torch.UntypedStorage.resize_, sys.excepthook) == (resize, on_error)
