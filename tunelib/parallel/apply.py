"""Spread a model over the processes: the one call that training and every tool make."""

from torch.distributed.fsdp import MixedPrecisionPolicy

from tunelib.config.resolve import resolve_reshard
from tunelib.config.schema import ActivationCheckpoint, Parallelism
from tunelib.model.decoder import Decoder
from tunelib.parallel.compile import apply_compile
from tunelib.parallel.context import ContextShare
from tunelib.parallel.fsdp import apply_fsdp
from tunelib.parallel.mesh import Layout
from tunelib.parallel.pipeline import Pipeline, parts_of
from tunelib.parallel.recompute import apply_recompute
from tunelib.parallel.runtime import Runtime
from tunelib.parallel.tensor import apply_tensor_parallel, overlap_products


def spread_model(
    model: Decoder,
    section: Parallelism,
    recompute: ActivationCheckpoint,
    layout: Layout,
    runtime: Runtime,
    stages: tuple[range, ...] = (),
    compiled: bool = False,
) -> None:
    """Change a model on the meta device in place, and then give its parameters empty storage where each belongs.

    Args:
        stages: the layers of each stage of a pipeline, as `plan_stages` gives them.
        compiled: whether layers are compiled, as `choose_compile` says.
    """
    pipeline = Pipeline(model, stages, section, layout, runtime) if layout.pipeline is not None else None
    model.pipeline = pipeline
    if layout.tensor is not None:
        apply_tensor_parallel(model, layout.tensor)
        if section.enable_async_tensor_parallel:
            overlap_products(layout.tensor)
    if compiled:
        apply_compile(model)
    apply_recompute(model, recompute)
    if layout.context is not None:
        model.share = ContextShare(layout.context, layout.tensor.size() if layout.tensor is not None else 1)
    for part in parts_of(model):
        part.share, part.head_share = model.share, model.head_share
        if layout.mesh is not None:
            dtypes = MixedPrecisionPolicy(param_dtype=runtime.compute_dtype, reduce_dtype=runtime.reduce_dtype)
            apply_fsdp(part, layout.mesh, dtypes, resolve_reshard(section), runtime.offloaded)
        part.to_empty(device=runtime.storage)
    if pipeline is not None:
        pipeline.listen()
    model.tie_weights()
