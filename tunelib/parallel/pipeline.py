"""Pipeline parallelism: consecutive layers lie on different processes, and micro-batches pass through them one behind the other.

torch's schedules order the work of a training step. Validation and generation, whose rows have other shapes, take one micro-batch after the
other through the stages; a stage goes on with the next while the stage after it works.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from tunelib.batch import Batch
from tunelib.config.resolve import BOTH_ENDS, resolve_num_stages
from tunelib.config.schema import Parallelism
from tunelib.errors import ConfigError
from tunelib.model.decoder import Decoder
from tunelib.parallel.mesh import Layout
from tunelib.parallel.runtime import Runtime

T = TypeVar("T")
MicroBatch = tuple[Tensor, tuple[int, ...], Tensor | None, bool]
"""What every stage needs of a micro-batch beside its input: positions, lengths of documents, labels, and whether they are scored."""


def plan_stages(model: Decoder, section: Parallelism, seq_len: int) -> tuple[range, ...]:
    """The layers of each stage, in their order; nothing without a pipeline.

    Args:
        model: the whole of it.
        seq_len: tokens per row, on which the work of attention depends.

    Raises:
        ConfigError: a model that cannot be cut into so many stages.
    """
    if section.pipeline_parallel_degree == 1:
        return ()
    key = f"parallelism.pipeline_parallel_degree = {section.pipeline_parallel_degree}"
    if model.config.tie_word_embeddings:
        raise ConfigError(f"{key}: the head of this model is its embedding, which would lie on the first and on the last process; set it to 1")
    count, num_layers = resolve_num_stages(section), model.config.num_hidden_layers
    begins = [int(point.rpartition(".")[2]) for point in section.pipeline_parallel_split_points]
    if begins and begins[-1] >= num_layers:
        last = f"layers.{num_layers - 1}"
        raise ConfigError(f"parallelism.pipeline_parallel_split_points: there is no layers.{begins[-1]}; the last layer is {last}")
    if count > num_layers:
        each, schedule = count // section.pipeline_parallel_degree, section.pipeline_parallel_schedule
        has = f"the model has {num_layers} layer{'s' if num_layers > 1 else ''}"
        ways = [f"the nearest below that works is {num_layers // each}"] if num_layers >= 2 * each else []
        ways += ['set parallelism.pipeline_parallel_schedule = "1F1B"'] if each > 1 and section.pipeline_parallel_degree <= num_layers else []
        ways = ways or ["shard it with parallelism.data_parallel_shard_degree instead"]
        raise ConfigError(f"{key} makes {count} stages with {schedule}, but {has}; {', or '.join(ways)}")
    begins = begins or balance(count_work(model, seq_len), count)
    return tuple(itertools.starmap(range, itertools.pairwise([0, *begins, num_layers])))


def count_work(model: Decoder, seq_len: int) -> list[int]:
    """Multiplications per token of each layer, with those of attention over full rows, and, in the last, of the head."""
    products = [
        sum(module.in_features * module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
        + seq_len * model.config.num_attention_heads * model.config.head_dim
        for layer in model.model.layers.values()
    ]
    return [*products[:-1], products[-1] + model.config.vocab_size * model.config.hidden_size]


def balance(work: list[int], count: int) -> list[int]:
    """Where to cut a list into consecutive parts so that the largest sum is as small as it can be: the first place of each part but the first."""
    sums = [0, *itertools.accumulate(work)]
    best: list[tuple[int, tuple[int, ...]]] = [(total, ()) for total in sums]  # of the first n, in one part: the largest sum, and the cuts
    for parts in range(2, count + 1):
        best = [
            min(((max(best[cut][0], sums[end] - sums[cut]), (*best[cut][1], cut)) for cut in range(parts - 1, end)), default=(sums[-1] + 1, ()))
            for end in range(len(sums))
        ]
    return list(best[-1][1])


class Pipeline:
    """This process's stages, and the way through all of them.

    Called as the whole model is, with one micro-batch, it passes forward only: with labels it returns the summed loss where the last stage is and 0
    elsewhere, or everywhere the scores that are asked for; without, the logits everywhere. Every process of the pipeline must call it.

    Args:
        model: on the meta device; keeps this process's layers only.
        stages: the layers of each stage.

    Attributes:
        parts: stage → its layers as a model, whose modules are those of ``model``.
        homes: by stage, the process that has it.
        owners: parameter → the process that has it.
        device: where it computes.
        schedule: torch's, for the shape of the newest step; None before the first.
    """

    def __init__(self, model: Decoder, stages: tuple[range, ...], section: Parallelism, layout: Layout, runtime: Runtime):
        assert layout.pipeline is not None
        self.group, self.rank, size = layout.pipeline.get_group(), layout.pipeline.get_local_rank(), layout.pipeline.size()
        self._schedule_class = get_schedule_class(section.pipeline_parallel_schedule)
        self.device, self._dtype, self._hidden_size = runtime.device, runtime.compute_dtype, model.config.hidden_size
        self._cuts = [axis.size() if axis is not None else 1 for axis in (layout.context, layout.tensor)]
        both_ends = section.pipeline_parallel_schedule in BOTH_ENDS
        self.homes = [2 * size - 1 - number if both_ends and number >= size else number % size for number in range(len(stages))]
        parts = [model.part(layers) for layers in stages]
        self.owners = {name: home for part, home in zip(parts, self.homes, strict=True) for name, _ in part.named_parameters()}
        self.parts = {number: part for number, part in enumerate(parts) if self.homes[number] == self.rank}
        model.keep([layer for number in self.parts for layer in stages[number]])
        self._coming: dict[int, Iterator[MicroBatch]] = {}
        self.schedule: Any = None
        self._shape = (0, 0, 0)
        self._num_trained, self._total = 1, torch.zeros(())

    def listen(self) -> None:
        """Have each part ask for the rest of its micro-batch when it is called with an input; last, so that no other hook comes before."""
        for number, part in self.parts.items():
            part.register_forward_pre_hook(lambda _, inputs, number=number: (*inputs, *next(self._coming[number])), prepend=True)

    def train(self, batches: list[Batch], num_trained: int) -> Tensor:
        """Forward and backward passes of a step; the summed loss, a float64 scalar, which is 0 but where the last stage is.

        Args:
            num_trained: what the loss is divided by before it goes back.
        """
        width = max(batch.tokens.shape[1] for batch in batches)
        batches = [batch.widened(width).to(self.device) for batch in batches]
        self.make_schedule((len(batches), *batches[0].tokens.shape))
        self._give((batch.positions, batch.document_lengths, batch.labels, False) for batch in batches)
        self._num_trained, self._total = num_trained, torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = [torch.cat([batch.tokens for batch in batches])] if 0 in self.parts else []
        self.schedule.step(*tokens, target=torch.empty(len(batches)), return_outputs=False)
        return self._total

    def __call__(
        self, tokens: Tensor, positions: Tensor, document_lengths: tuple[int, ...], labels: Tensor | None = None, score: bool = False
    ) -> Tensor:
        self._give([(positions, document_lengths, labels, score)])
        last = len(self.homes) - 1
        passed = tokens
        for number, part in self.parts.items():
            if number > 0 and self.homes[number - 1] != self.rank:
                passed = self._receive(self.homes[number - 1])
            passed = part(passed)
            if number < last and self.homes[number + 1] != self.rank:
                self._send(passed, self.homes[number + 1])
        if labels is None or score:
            return self.broadcast(passed if last in self.parts else None, self.homes[last])
        return passed if last in self.parts else torch.zeros((), device=self.device)

    def broadcast(self, tensor: Tensor | None, home: int) -> Tensor:
        """A tensor of one process of the pipeline, on all of them."""
        header: list[Any] = [(tensor.shape, tensor.dtype, tensor.device.type) if tensor is not None else None]
        dist.broadcast_object_list(header, group=self.group, group_src=home)
        shape, dtype, kind = header[0]
        device = self.device if kind == self.device.type else torch.device(kind)  # offloaded weights lie elsewhere
        whole = tensor.contiguous() if tensor is not None else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole, group=self.group, group_src=home)
        return whole

    def gather(self, own: T) -> list[T]:
        """What each process of the pipeline has, by rank."""
        values: list[Any] = [None] * self.group.size()
        dist.all_gather_object(values, own, group=self.group)
        return values

    def _give(self, micro_batches: Iterable[MicroBatch]) -> None:
        given = list(micro_batches)
        self._coming = {number: iter(given) for number in self.parts}

    def _divide(self, loss: Tensor, _: Tensor) -> Tensor:
        self._total += loss.detach()
        return loss / self._num_trained

    def make_schedule(self, shape: tuple[int, int, int]) -> None:
        """Make ``schedule`` for so many micro-batches of so many rows of so many tokens: it has a buffer for each."""
        if shape == self._shape:
            return
        count, rows, width = self._shape = shape
        context, tensor = self._cuts
        unit = tensor * (2 * context if context > 1 else 1)  # as rows are padded before they are cut
        cut = -(-width // unit) * unit // (context * tensor)
        tokens = torch.empty(rows, width, dtype=torch.int64, device="meta")
        hidden = torch.empty(rows, cut, self._hidden_size, dtype=self._dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.promote_types(self._dtype, torch.float32), device="meta", requires_grad=True)
        last = len(self.homes) - 1
        stages = [
            PipelineStage(
                part,
                number,
                len(self.homes),
                self.device,
                input_args=hidden if number else tokens,
                output_args=hidden if number < last else loss,
                group=self.group,
            )
            for number, part in self.parts.items()
        ]
        holds_many = issubclass(self._schedule_class, PipelineScheduleMulti)
        self.schedule = self._schedule_class(stages if holds_many else stages[0], count, loss_fn=self._divide, scale_grads=False)

    def _send(self, hidden: Tensor, home: int) -> None:
        dist.send(torch.tensor(hidden.shape, device=self.device), group=self.group, group_dst=home)
        dist.send(hidden.contiguous(), group=self.group, group_dst=home)

    def _receive(self, home: int) -> Tensor:
        shape = torch.empty(3, dtype=torch.int64, device=self.device)
        dist.recv(shape, group=self.group, group_src=home)
        hidden = torch.empty(shape.tolist(), dtype=self._dtype, device=self.device)
        dist.recv(hidden, group=self.group, group_src=home)
        return hidden


def parts_of(model: Decoder) -> list[Decoder]:
    """The models that are called on this process: its stages of a pipeline, or the model itself."""
    return list(model.pipeline.parts.values()) if isinstance(model.pipeline, Pipeline) else [model]


def over_stages(model: Decoder, own: dict[str, T]) -> dict[str, T]:
    """What processes say of their parameters, put together for the whole model. Collective in a pipeline."""
    return {name: value for part in model.pipeline.gather(own) for name, value in part.items()} if isinstance(model.pipeline, Pipeline) else own


def whole_of(model: Decoder, name: str, own: Tensor | None) -> Tensor:
    """A weight, on every process of the pipeline; its owner gives it. Collective in a pipeline."""
    if isinstance(model.pipeline, Pipeline):
        return model.pipeline.broadcast(own, model.pipeline.owners[name])
    assert own is not None, name
    return own
