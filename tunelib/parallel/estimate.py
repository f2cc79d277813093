"""The memory of a training step, worked out without the machine that it is for: the real model, spread by the calls that training makes, takes
a step on tensors that have shapes and no numbers, as one rank of a group in which nothing is sent.

What it gives up. Every token of every row counts as trained, and every row is one document: the most that a row can need. Shapes are worked
out as on a CPU, with the data types of the device that is planned for. Where CUDA has FlexAttention, the CPU's flash attention stands in, which
keeps the same (inputs, output, a number per head and token); where CUDA has one kernel for a norm, the CPU's several need more while they work.
What no tensor holds is not seen: the CUDA context, the buffers of NCCL, space between tensors, and what kernels allocate inside. B batch, S sequence.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tunelib.adapters import add_adapters
from tunelib.batch import Batch
from tunelib.config import resolve_data_ranks, resolve_local_batch_size
from tunelib.config.schema import ActivationCheckpoint, Lora, Optimizer, Parallelism, Training
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.optimizer import build_optimizer, prepare_state, state_tensors
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import Layout, build_layout
from tunelib.parallel.pipeline import Pipeline, parts_of, plan_stages
from tunelib.parallel.reduce import clip_gradients, local, sum_over_ranks
from tunelib.parallel.runtime import Runtime, resolve_dtypes
from tunelib.parallel.tensor import check_split
from tunelib.quantize import forget_levels

HEAP = 1.2
"""Resident memory on a CPU ÷ memory of tensors, about."""


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a step.

    Attributes:
        world_size: processes, a GPU each.
        device: "cuda" or "cpu": what "auto" data types become.
    """

    model: ModelConfig
    world_size: int
    device: str
    training: Training
    parallelism: Parallelism = field(default_factory=Parallelism)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)

    @property
    def num_data_ranks(self) -> int:
        """Processes that each read a share of the batch."""
        return resolve_data_ranks(self.parallelism, self.world_size)

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return resolve_local_batch_size(self.training, self.parallelism, self.world_size)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank."""
        return self.training.global_batch_size // (self.num_data_ranks * self.rows)


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the moment when it holds most.

    Attributes:
        parameters: its share of them.
        gathered: layers' whole parameters while they are computed with, and what is being received of the next.
        gradients: those kept for the optimizer, and those of whole layers on their way to other ranks.
        optimizer: its share of the state.
        activations: what the backward pass will need, what a layer is working with, and the batch.
        logits: what head and loss have made besides gradients of parameters, from the head's beginning to the end of its backward pass.
    """

    parameters: int = 0
    gathered: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by kind."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Estimate:
    """What a plan needs.

    Attributes:
        layout: the arrangement in a few words.
        peak: of the rank that needs most, which is rank.
        moment: in which part of the step.
        parameters: numbers of the whole model with its adapters; trained: of them.
        checkpoint_bytes: of one checkpoint: what is trained, and the optimizer's state, of all ranks.
    """

    plan: Plan
    layout: str
    rank: int
    peak: Memory
    moment: str
    parameters: int
    trained: int
    checkpoint_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What a process on a CPU grows by, beyond the imported libraries: freed pieces leave gaps in its heap (measured in docs/estimate.md)."""
        return round(self.peak.total * HEAP)


def estimate_memory(plan: Plan) -> Estimate:
    """What the rank of a plan needs that needs most.

    Raises:
        ConfigError: the model does not divide, or its layers have not what adapters ask for.
    """
    estimates = [_estimate_rank(plan, rank) for rank in ranks_to_look_at(plan)]
    return max(estimates, key=lambda estimate: estimate.peak.total)


def ranks_to_look_at(plan: Plan) -> list[int]:
    """Ranks of which one needs most: of each stage of a pipeline the first, which has the largest shards and parts; and where rows are cut, one with
    the last part, whose masks are the largest."""
    section = plan.parallelism
    parts = section.context_parallel_degree
    firsts = [stage * plan.world_size // section.pipeline_parallel_degree for stage in range(section.pipeline_parallel_degree)]
    return [first + part * section.tensor_parallel_degree for first in firsts for part in dict.fromkeys((0, parts - 1))]


def _estimate_rank(plan: Plan, rank: int) -> Estimate:
    """Set up as train.py does, and take the step."""
    offloaded = plan.training.enable_cpu_offload
    runtime = Runtime(rank, plan.world_size, torch.device("cpu"), *resolve_dtypes(plan.training, torch.device(plan.device)), offloaded)
    with _nobody_else(runtime):
        layout = build_layout(plan.parallelism, runtime)
        model = build_on_meta(plan.model, runtime.param_dtype)
        check_split(plan.model, plan.lora, plan.parallelism.tensor_parallel_degree)
        if plan.lora.enable:
            add_adapters(model, plan.lora)
        stages = plan_stages(model, plan.parallelism, plan.training.seq_len)
        numbers = sum(_count_weights(parameter) for parameter in model.parameters())
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        on_meta = replace(runtime, device=torch.device("meta"), offloaded=False)
        spread_model(model, plan.parallelism, plan.activation_checkpoint, layout, on_meta, stages)
        with _Paper(allow_non_fake_inputs=True) as paper:
            for part in parts_of(model):  # as spread_model would, but without storage; the mesh it needs is made of numbers
                part.to_empty(device=runtime.device)
            model.tie_weights()
            if isinstance(model.pipeline, Pipeline):
                model.pipeline.device = runtime.device
            optimizer = build_optimizer(model, plan.optimizer)
            prepare_state(optimizer)
            ledger = _Ledger(paper)
            if not offloaded:
                ledger.enter("parameters", model.parameters())
            state = [value for parameter in optimizer.state for _, value in state_tensors(optimizer, parameter)]
            if not offloaded:
                ledger.enter("optimizer", state)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if plan.micro_batches > 1 and not stages:  # a later one meets the gradients of the first
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    if not offloaded:
                        ledger.enter("gradients", [parameter.grad])
            take_step(model, optimizer, plan, layout, ledger)
        peak, moment = ledger.peak()
        of_trained = sum(tensor.numel() * tensor.element_size() for tensor in [*trained, *state]) / sum(parameter.numel() for parameter in trained)
        return Estimate(plan, layout.sentence, rank, peak, moment, numbers, num_trained, round(of_trained * num_trained))


def take_step(model: Decoder, optimizer: torch.optim.Optimizer, plan: Plan, layout: Layout, ledger: "_Ledger") -> None:
    """What train.py's train_step does with its last micro-batch, but for reading numbers."""
    rows, width = plan.rows, plan.training.seq_len
    with ledger, ledger.watch(model):
        total = torch.zeros((), dtype=torch.float64)
        num_trained = plan.training.global_batch_size * width
        if isinstance(model.pipeline, Pipeline):
            ledger.moment = "forward and backward passes"
            tokens, labels, positions = torch.zeros(3, rows, width, dtype=torch.int64).unbind()
            empty = Batch(tokens, labels, positions, (width,) * rows)
            batches = [empty] * plan.micro_batches
            model.pipeline.make_schedule((plan.micro_batches, rows, width))
            _skip_votes(model.pipeline)
            total += model.pipeline.train(batches, num_trained)
        else:
            tokens, positions, labels = torch.zeros(3, rows, width, dtype=torch.int64).unbind()  # (B, S)
            summed = model(tokens, positions, (width,) * rows, labels=labels)
            ledger.moment = "backward pass"
            (summed / num_trained).backward()
            total += summed.detach()
        ledger.rename("gradients", [parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        ledger.moment = "optimizer's step"
        clip_gradients(model.parameters(), plan.training.max_norm, layout.pipeline)
        sum_over_ranks(total, layout.sums)
        if plan.optimizer.name == "AdamW8bit":  # whose compiled step holds two copies of the matrix in hand, in float32 (seen on a CPU)
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.empty(2, max(local(parameter).numel() for parameter in trained), dtype=torch.float32)
        else:
            optimizer.step()
        optimizer.zero_grad()


def _skip_votes(pipeline: Pipeline) -> None:
    """Have stages not ask each other, before the first step, whether all know what they will be sent: they do."""
    stages = [pipeline.schedule._stage] if hasattr(pipeline.schedule, "_stage") else pipeline.schedule._stages
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC
    pipeline.schedule._warmup_p2p = lambda *_: None


def _count_weights(parameter: Tensor) -> int:
    """Of which NF4 holds 16 in 9 bytes."""
    return parameter.numel() * 16 // 9 if parameter.dtype == torch.uint8 else parameter.numel()


@contextlib.contextmanager
def _nobody_else(runtime: Runtime) -> Iterator[None]:
    """A process group for one rank of many, in which nothing is sent and all seem to have answered. What was made meanwhile is forgotten."""
    if not runtime.sharded:
        try:
            yield
        finally:
            forget_levels()
        return
    on_error = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=runtime.rank, world_size=runtime.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = on_error  # torch's names the rank
        forget_levels()
        _clear_sharding_prop_cache()  # DTensor remembers groups, which are no more


class _Paper(FakeTensorMode):
    """Tensors of shapes without numbers. DTensor borrows it, to work out shapes on whole tensors that no rank ever holds."""

    depth = 0

    @property
    def is_borrowed(self) -> bool:
        return self.depth > 1

    def __enter__(self) -> "_Paper":
        super().__enter__()
        self.depth += 1
        return self

    def __exit__(self, *problem: Any) -> None:
        self.depth -= 1
        super().__exit__(*problem)


@dataclass(eq=False)
class _Entry:
    """A piece of memory, which may yet turn out to be of another kind."""

    kind: str
    size: int = 0
    life: Any = None


class _Ledger(TorchDispatchMode):
    """Writes down every piece of memory that operators make, when it changes its size, and when nothing refers to it any more.

    Kinds are known late (a tensor becomes a gradient after it was made), so that the peak is found at the end.
    """

    moment = "forward pass"
    in_head = False

    def __init__(self, paper: _Paper):
        super().__init__()
        self._paper = paper
        self._entries: dict[int, _Entry] = {}
        self._changes: list[tuple[_Entry, int, str]] = []

    def enter(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Write down what is there, or has just been made."""
        for tensor in tensors:
            self._enter(kind, local(tensor))

    def rename(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what has been written down as something else."""
        for tensor in tensors:
            entry = self._entries.get(local(tensor).untyped_storage()._cdata)
            if entry is not None and entry.kind in ("activations", "logits"):
                entry.kind = kind

    def peak(self) -> tuple[Memory, str]:
        """What was held when most was, and in which part of the step."""
        now = most = place = 0
        for number, (_, change, _) in enumerate(self._changes):
            now += change
            if now > most:
                most, place = now, number
        held: Counter[str] = Counter()
        for entry, change, _ in self._changes[: place + 1]:
            held[entry.kind] += change
        return Memory(**held), self._changes[place][2]

    @contextlib.contextmanager
    def watch(self, model: Decoder) -> Iterator[None]:
        """A block in which is noticed what head and loss make, and which whole parameters modules compute with."""

        def leave(_gradient: Tensor) -> None:
            self.in_head = False

        def arrive(_norm: nn.Module, _inputs: Any, hidden: Tensor) -> None:
            self.in_head = True
            self.rename("gathered", model.lm_head.parameters())  # which the loss computes with
            if hidden.requires_grad:
                hidden.register_hook(leave)

        def compute(module: nn.Module, _inputs: Any) -> None:
            self.rename("gathered", module.parameters())

        handles = [module.register_forward_pre_hook(compute) for module in model.modules() if module._parameters]
        if model.is_last:
            handles.append(model.model.norm.register_forward_hook(arrive))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __enter__(self) -> "_Ledger":
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 gives and takes back layers so, past all operators
            result = resize(storage, size)
            if entry := self._entries.get(storage._cdata):
                self._change(entry, storage.nbytes())
            return result

        self._resize = resize
        torch.UntypedStorage.resize_ = resize_and_note  # type: ignore[method-assign,assignment]  # no operator is called to listen to
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # to see what it does inside
        result = _all_places(args[0]) if operator is torch.ops.aten.nonzero.default else operator(*args, **(kwargs or {}))
        if self._paper.is_borrowed:
            return result
        for tensor in _tensors_in(result):
            self._enter("logits" if self.in_head else "activations", tensor)
        if operator.namespace == "fsdp":
            words = (args, kwargs)
            if "chunk_cat" in operator.name():
                self.rename("gradients", _tensors_in(words))
            else:
                self.rename("gathered", _tensors_in((result, words)))
        elif operator is torch.ops.c10d._reduce_scatter_base_.default and self._kind_of(args[1]) == "gradients":
            self.rename("gradients", [args[0]])
        return result

    def _enter(self, kind: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(kind)
            entry.life = weakref.ref(storage, lambda _: self._change(self._entries.pop(key), 0))
        self._change(entry, storage.nbytes())

    def _change(self, entry: _Entry, size: int) -> None:
        if size != entry.size:
            self._changes.append((entry, size - entry.size, self.moment))
            entry.size = size

    def _kind_of(self, tensor: Tensor) -> str:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry.kind if entry is not None else ""


def _all_places(mask: Tensor) -> Tensor:
    """The places of a mask, which has no numbers here, as if it were full of ones: (their number, axes)."""
    return mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
