"""How the processes are arranged: replicas of shares of parts of rows."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunelib.config import resolve_shard_degree
from tunelib.config.schema import Parallelism
from tunelib.parallel.runtime import Runtime


@dataclass(frozen=True)
class Layout:
    """The arrangement. Ranks count parts of rows first, then shares of the batch, then replicas of the model.

    Attributes:
        mesh: over which parameters are sharded, with the axis "shard", and "replicate" before it where there are replicas; None where nothing
            is sharded. Processes that work on parts of one row hold different shards.
        context: the processes that work on parts of the rows of this one, with the axis "context"; None where each has whole rows.
        data_rank: which part of every batch this process works on; num_data_ranks: into how many parts it is dealt.
        replica: which copy of the model this process holds a shard of.
    """

    mesh: DeviceMesh | None
    context: DeviceMesh | None
    data_rank: int
    num_data_ranks: int
    replica: int
    degrees: tuple[tuple[str, int], ...]

    @property
    def ranks_per_share(self) -> int:
        """Processes that work on the same rows."""
        return self.context.size() if self.context is not None else 1

    @property
    def sentence(self) -> str:
        """The arrangement in a few words."""
        return ", ".join(f"{name} {degree}" for name, degree in self.degrees if degree > 1) if self.mesh is not None else "not sharded"


def build_layout(section: Parallelism, runtime: Runtime) -> Layout:
    """Arrange the processes as [parallelism] asks; the config check has shown that the degrees fit."""
    replicate, context = section.data_parallel_replicate_degree, section.context_parallel_degree
    shard = resolve_shard_degree(section, runtime.world_size)
    assert replicate * shard * context == runtime.world_size, "checked in config/check.py"
    degrees = (("replicated over", replicate), ("sharded over", shard * context), ("rows cut in", context))
    mesh = rows = None
    if runtime.sharded:
        sizes, names = ((replicate, shard * context), ("replicate", "shard")) if replicate > 1 else ((shard * context,), ("shard",))
        mesh = init_device_mesh(runtime.device.type, sizes, mesh_dim_names=names)
        if context > 1:
            rows = init_device_mesh(runtime.device.type, (replicate * shard, context), mesh_dim_names=("data", "context"))["context"]
    return Layout(mesh, rows, runtime.rank // context, replicate * shard, runtime.rank // (shard * context), degrees)
