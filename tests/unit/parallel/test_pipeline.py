"""Where a model is cut into stages, and what torch's schedules can order."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.testing._internal.distributed.fake_pg import FakeStore

from tunelib.config.check import has_order
from tunelib.config.resolve import resolve_num_stages
from tunelib.config.schema import Parallelism
from tunelib.errors import ConfigError
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.model.families import parse_config
from tunelib.parallel.pipeline import balance, count_work, plan_stages

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def make(**changes: object) -> Decoder:
    config: ModelConfig = replace(parse_config(FIELDS, "a test"), **changes)
    return build_on_meta(config, torch.float32)


def test_stages_are_cut_so_that_the_largest_is_as_small_as_it_can_be() -> None:
    assert balance([1, 1, 1, 1], 2) == [2]
    assert balance([1, 1, 1, 1, 1, 4], 3) == [2, 5] or balance([1, 1, 1, 1, 1, 4], 3) == [3, 5]
    assert balance([5, 1, 1, 1], 4) == [1, 2, 3]
    work = [3, 1, 4, 1, 5, 9, 2, 6]
    for count in range(1, 9):
        smallest = min(largest_sum(work, cuts) for cuts in itertools.combinations(range(1, 8), count - 1))
        assert largest_sum(work, balance(work, count)) == smallest


def largest_sum(work: list[int], cuts: Sequence[int]) -> int:
    return max(sum(work[begin:end]) for begin, end in itertools.pairwise([0, *cuts, len(work)]))


def test_the_head_counts_as_the_layers_that_it_is_worth() -> None:
    model = make()
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64
    assert count_work(model, 128) == [layer + 128 * 32] * 7 + [layer + 128 * 32 + 512 * 32]
    sizes = [len(stage) for stage in plan_stages(model, Parallelism(pipeline_parallel_degree=2), 128)]
    assert sizes == [5, 3]  # the head is worth 1.2 layers


def test_stages_are_where_they_were_asked_for() -> None:
    section = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_split_points=("model.layers.7",))
    assert plan_stages(make(), section, 128) == (range(7), range(7, 8))
    assert plan_stages(make(), Parallelism(), 128) == ()


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ({"pipeline_parallel_degree": 9}, {}, "makes 9 stages with 1F1B, but the model has 8 layers; the nearest below that works is 8"),
        ({"pipeline_parallel_degree": 5, "pipeline_parallel_schedule": "ZBVZeroBubble"}, {}, "makes 10 stages .* the nearest below that works is 4"),
        ({"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"}, {"num_hidden_layers": 1}, "has 1 layer; shard it with"),
        (
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
            {"num_hidden_layers": 3},
            '3 layers; set parallelism.pipeline_parallel_schedule = "1F1B"',
        ),
        ({"pipeline_parallel_degree": 2}, {"tie_word_embeddings": True}, "the head of this model is its embedding"),
        (
            {"pipeline_parallel_degree": 2, "pipeline_parallel_split_points": ("layers.8",)},
            {},
            r"there is no layers\.8; the last layer is layers\.7",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_name(section: dict, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_stages(make(**changes), Parallelism(**section), 128)


def test_a_part_has_the_modules_of_the_whole_under_their_names() -> None:
    model = make()
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    first, last = model.part(range(5)), model.part(range(5, 8))
    found = {name: id(parameter) for part in (first, last) for name, parameter in part.named_parameters()}
    assert found == names
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert "lm_head.weight" not in dict(first.named_parameters())
    model.keep([5, 6, 7])
    assert dict(model.named_parameters()).keys() == dict(last.named_parameters()).keys()


@pytest.fixture
def pretend_group() -> Iterator[None]:
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_what_is_refused_is_what_torch_cannot_order(pretend_group: None, schedule: str, degree: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degree)
    num_stages = resolve_num_stages(Parallelism(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule))  # type: ignore[arg-type]
    kind = get_schedule_class(schedule)
    own = [0] if num_stages == degree else [0, num_stages - 1] if schedule in ("ZBVZeroBubble", "DualPipeV") else [0, degree]
    for count in range(1, 20):
        stages = [PipelineStage(nn.Linear(2, 2), number, num_stages, torch.device("cpu")) for number in own]
        try:
            kind(stages if issubclass(kind, PipelineScheduleMulti) else stages[0], count, loss_fn=lambda *_: None)
            is_ordered = True
        except ValueError:
            is_ordered = False
        assert has_order(schedule, degree, count) <= is_ordered, count  # what is let through works
        if count >= degree:
            assert has_order(schedule, degree, count) == is_ordered, count
