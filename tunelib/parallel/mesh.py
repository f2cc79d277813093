"""How the processes are arranged: layers, replicas, shards, parts of rows, parts of products."""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunelib.config import resolve_shard_degree
from tunelib.config.schema import Parallelism
from tunelib.parallel.reduce import gather_objects
from tunelib.parallel.runtime import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The arrangement. Ranks count parts of products first, then parts of rows, shares of the batch, replicas, and stages of the model.

    Attributes:
        mesh: over which parameters are sharded, with the axis "shard", and "replicate" before it where there are replicas; None where nothing
            is sharded. Processes that work on parts of one row hold different shards.
        context: the processes that work on parts of the rows of this one, with the axis "context"; None where each has whole rows.
        tensor: the processes over which matrix products are split, with the axis "tensor"; None where they are whole.
        pipeline: the processes that have different layers and the same rows, with the axis "pipeline"; None where each has all layers.
        sums: the processes whose losses add up: one of each that compute the same.
        data_rank: which part of every batch this process works on; num_data_ranks: into how many parts it is dealt.
    """

    mesh: DeviceMesh | None
    context: DeviceMesh | None
    tensor: DeviceMesh | None
    pipeline: DeviceMesh | None
    sums: dist.ProcessGroup | None
    data_rank: int
    num_data_ranks: int
    degrees: tuple[tuple[str, int], ...]

    def gather_shares(self, value: T) -> list[T]:
        """What each part of the batch has to say, by data rank: the processes that work on the same rows say the same. Collective."""
        ranks_per_share = math.prod(axis.size() for axis in (self.context, self.tensor) if axis is not None)
        return gather_objects(value)[::ranks_per_share][: self.num_data_ranks]

    @property
    def sentence(self) -> str:
        """The arrangement in a few words."""
        return ", ".join(f"{name} {degree}" for name, degree in self.degrees if degree > 1) or "not sharded"


def build_layout(section: Parallelism, runtime: Runtime) -> Layout:
    """Arrange the processes as [parallelism] asks; the config check has shown that the degrees fit."""
    replicate, context, split = section.data_parallel_replicate_degree, section.context_parallel_degree, section.tensor_parallel_degree
    shard, stages = resolve_shard_degree(section, runtime.world_size), section.pipeline_parallel_degree
    assert stages * replicate * shard * context * split == runtime.world_size, "checked in config/check.py"
    degrees = (
        ("layers over", stages),
        ("replicated over", replicate),
        ("sharded over", shard * context),
        ("rows cut in", context),
        ("products split over", split),
    )
    mesh = rows = products = layers = sums = None
    if runtime.sharded:
        axes = {"pipeline": stages, "replicate": replicate, "shard": shard * context, "tensor": split}
        names = tuple(name for name, degree in axes.items() if degree > 1 or name == "shard")
        whole = init_device_mesh(runtime.device.type, tuple(axes[name] for name in names), mesh_dim_names=names)
        mesh = whole["replicate", "shard"] if replicate > 1 else whole["shard"]
        if stages > 1:
            layers = whole["pipeline"]
        if split > 1:
            products = whole["tensor"]
            sums = init_device_mesh(runtime.device.type, (runtime.world_size // split, split), mesh_dim_names=("sums", "tensor")).get_group("sums")
        if context > 1:
            names = ("data", "context", "tensor")
            rows = init_device_mesh(runtime.device.type, (stages * replicate * shard, context, split), mesh_dim_names=names)["context"]
    data_rank = runtime.rank // (context * split) % (replicate * shard)
    return Layout(mesh, rows, products, layers, sums, data_rank, replicate * shard, degrees)
