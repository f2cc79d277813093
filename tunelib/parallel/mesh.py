"""How the processes are arranged: one device mesh, its axes named."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunelib.config.schema import Parallelism
from tunelib.parallel.runtime import Runtime


@dataclass(frozen=True)
class Layout:
    """The arrangement. ``mesh`` has the axis "shard" and is None where nothing is sharded.

    Attributes:
        data_rank: which part of every batch this process works on; num_data_ranks: into how many parts it is dealt.
    """

    mesh: DeviceMesh | None
    data_rank: int
    num_data_ranks: int


def build_layout(section: Parallelism, runtime: Runtime) -> Layout:
    """Arrange the processes as [parallelism] asks; the config check has shown that the degrees fit."""
    degree = section.data_parallel_shard_degree
    assert degree in (-1, runtime.world_size), "checked in config/check.py"
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,), mesh_dim_names=("shard",)) if runtime.sharded else None
    return Layout(mesh, runtime.rank, runtime.world_size)
