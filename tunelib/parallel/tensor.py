"""Tensor parallelism: every matrix product split over several processes, which hold parts of the sequence between them.

Queries, keys, values, gate and up are split by rows of their weights, what follows them by columns (Shoeybi et al. 2019); norms and the residual
stream are split along the sequence (Korthikanti et al. 2022), embedding and head by the vocabulary, whose logits are never gathered.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tunelib.adapters import AdaptedLinear
from tunelib.batch import IGNORED, pad_documents
from tunelib.config.schema import Lora
from tunelib.errors import ConfigError
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, DecoderLayer
from tunelib.model.loss import summed_loss, take, token_scores

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")


def check_split(config: ModelConfig, lora: Lora, degree: int) -> None:
    """Make sure that a model divides by a degree of tensor parallelism.

    Raises:
        ConfigError: naming what does not, and the largest degree below that works.
    """
    key = f"parallelism.tensor_parallel_degree = {degree}"
    if degree > 1 and lora.enable and lora.quantize_base != "none":
        raise ConfigError(f"{key}: a base in {lora.quantize_base} is not split; shard it with parallelism.data_parallel_shard_degree instead")
    if degree > 1 and lora.enable and lora.dropout:
        raise ConfigError(f"{key}: lora.dropout = {lora.dropout:g} cannot be drawn alike where products are split; set it to 0")
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")}
    if unfit := [f"{name} = {size}" for name, size in sizes.items() if size % degree]:
        below = next(number for number in range(degree - 1, 0, -1) if not any(size % number for size in sizes.values()))
        raise ConfigError(f"{key} does not divide {' and '.join(unfit)}; the nearest below that works is {below}")


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split a model on the meta device in place; its parameters become parts on ``mesh``, with one axis."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in model.model.layers.values():
        assert isinstance(layer, DecoderLayer)
        parallelize_module(layer, mesh, _plan_layer(layer, model.config, mesh))
    outer: dict[str, ParallelStyle] = {}
    if model.is_first:
        outer["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if model.is_last:
        outer["model.norm"] = SequenceParallel()
        outer["lm_head"] = ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, outer)
    model.tie_weights()  # which the split has undone, as it has what is frozen
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    model.head_share = HeadShare(mesh, model.config.final_softcap)


def _plan_layer(layer: DecoderLayer, config: ModelConfig, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """How each part of a layer is split, whatever of them its family has."""
    plan: dict[str, ParallelStyle] = {
        "self_attn": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        **{name: SequenceParallel(use_local_output=True) for name in layer.norms.names},
    }
    sections = {
        "qkv_proj": [heads * config.head_dim for heads in layer.self_attn.heads],
        "gate_up_proj": [config.intermediate_size, config.intermediate_size],
    }
    for path, module in layer.named_modules():
        name, is_adapted = path.rpartition(".")[2], isinstance(module, AdaptedLinear)
        if name in BY_ROWS:
            plan[path] = _AdaptedByRows() if is_adapted else ColwiseParallel()
        elif name in BY_COLUMNS:
            plan[path] = _AdaptedByColumns(output_layouts=Shard(1)) if is_adapted else RowwiseParallel(output_layouts=Shard(1))
        elif name in sections:
            plan[path] = _FusedByRows(sections[name], mesh)
        elif name in ("q_norm", "k_norm"):
            plan[path] = SequenceParallel(sequence_dim=2, use_local_output=True) if config.qk_norm == "head" else _NormOfHeads()  # heads are cut
    return plan


def overlap_products(mesh: DeviceMesh) -> None:
    """Have compiled layers work out split products piece by piece while other pieces are on their way; on CUDA only.

    Raises:
        ConfigError: elsewhere.
    """
    if mesh.device_type != "cuda":
        raise ConfigError(f"parallelism.enable_async_tensor_parallel: it works between GPUs, and this run is on {mesh.device_type}; remove it")
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


class _AdaptedByRows(ColwiseParallel):
    """A layer with an adapter, split as its frozen weight is: A whole, B and DoRA's lengths by rows."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _distribute(module, device_mesh, lambda key: Replicate() if name == "lora_A" else Shard(0))


class _FusedByRows(_AdaptedByRows):
    """Several matrices in one, with or without an adapter: each process has a part of its rows, and goes on with its part of what each has given.

    What it gives up: rows are cut without regard for where a matrix ends, so that outputs are gathered before each process takes its own.

    Args:
        sections: rows of each matrix.
    """

    def __init__(self, sections: list[int], mesh: DeviceMesh):
        super().__init__()
        self._prepare_output_fn = functools.partial(_take_own, sections, mesh.get_local_rank(), mesh.size())  # type: ignore[method-assign]


def _take_own(sections: list[int], rank: int, count: int, _layouts: Any, _is_local: Any, _module: nn.Module, outputs: DTensor, _mesh: Any) -> Tensor:
    """(B, S, all rows) by rows → (B, S, own rows of each section)."""
    whole = outputs.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return torch.cat([part.chunk(count, dim=-1)[rank] for part in whole.split(sections, dim=-1)], dim=-1)


class _NormOfHeads(ParallelStyle):
    """A norm over all heads of a token, of which each process has some: it is taken of the whole, and each goes on with its part."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def split(_name: str, norm: nn.Module, mesh: DeviceMesh) -> None:
            _distribute(norm, mesh, lambda key: Shard(0))

        return distribute_module(module, device_mesh, split, _gather_heads, _split_heads)


def _gather_heads(_norm: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False).redistribute(placements=[Replicate()])


def _split_heads(_norm: nn.Module, outputs: DTensor, _mesh: DeviceMesh) -> Any:
    return outputs.redistribute(placements=[Shard(2)]).to_local()


class _AdaptedByColumns(RowwiseParallel):
    """A layer with an adapter, split as its frozen weight is: A by columns, B and DoRA's lengths whole."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _distribute(module, device_mesh, lambda key: Shard(1) if name in ("", "lora_A") and key == "weight" else Replicate())


def _distribute(module: nn.Module, mesh: DeviceMesh, place: Callable[[str], Placement]) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [place(key)])))


@dataclass(frozen=True)
class HeadShare:
    """The head and the loss where the vocabulary is split.

    Attributes:
        mesh: the processes that share it.
        softcap: of the logits that the loss is taken of.
    """

    mesh: DeviceMesh
    softcap: float = 0.0

    def pad(
        self, tokens: Tensor, positions: Tensor, labels: Tensor | None, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]]:
        """Rows whose length divides by the processes; what is added is a document of its own, at the end of each row."""
        width = tokens.shape[1]
        padding = -width % self.mesh.size()
        if not padding:
            return tokens, positions, labels, lengths
        tokens, positions = F.pad(tokens, (0, padding)), F.pad(positions, (0, padding))
        return tokens, positions, None if labels is None else F.pad(labels, (0, padding), value=IGNORED), pad_documents(lengths, width, padding)

    def loss(self, hidden: Tensor, asked: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
        """What `tunelib.model.loss.summed_loss` gives of the places in ``asked``, without logits of the whole vocabulary anywhere.

        Args:
            hidden: (B, S, hidden), split along the sequence.
            asked: (T), counted over all rows.
            labels: (T).
        """
        assert isinstance(head.weight, DTensor)
        rows = head.weight.to_local()  # (V / n, hidden)
        part = _VocabularyPart(self.mesh.get_local_rank() * len(rows), self.mesh.get_group())
        return summed_loss(take(asked, _whole(hidden).to_local(grad_placements=[Partial()])), labels, rows, part, self.softcap)

    def scores(self, hidden: Tensor, asked: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
        """What `tunelib.model.loss.token_scores` gives of the places in ``asked``, on every process."""
        return token_scores(take(asked, _whole(hidden).to_local()), labels, lambda chosen: head(chosen).full_tensor(), self.softcap)

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """(B, S, V) before they are capped, whole on every process."""
        return head(_whole(hidden).to_local()).full_tensor()


def _whole(hidden: Tensor) -> DTensor:
    """(B, S, hidden) on every process, of what the last norm leaves split along the sequence."""
    assert isinstance(hidden, DTensor)
    return hidden.redistribute(placements=[Replicate()])


@dataclass(frozen=True)
class _VocabularyPart:
    """This process's part of the vocabulary, for `summed_loss`."""

    first: int
    group: dist.ProcessGroup

    def combine(self, logsumexp: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Over the whole vocabulary, of what each process has of its part. Collective."""
        largest = logsumexp.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        both = torch.stack(((logsumexp - largest).exp_(), chosen))
        dist.all_reduce(both, group=self.group)
        return largest + both[0].log(), both[1]
