"""Spread a model over the processes: the one call that training and every tool make."""

from tunelib.config.resolve import resolve_reshard
from tunelib.config.schema import ActivationCheckpoint, Parallelism
from tunelib.model.decoder import Decoder
from tunelib.parallel.context import ContextShare
from tunelib.parallel.fsdp import apply_fsdp
from tunelib.parallel.mesh import Layout
from tunelib.parallel.pipeline import Pipeline, parts_of
from tunelib.parallel.recompute import apply_recompute
from tunelib.parallel.runtime import Runtime
from tunelib.parallel.tensor import apply_tensor_parallel


def spread_model(
    model: Decoder, section: Parallelism, recompute: ActivationCheckpoint, layout: Layout, runtime: Runtime, stages: tuple[range, ...] = ()
) -> None:
    """Change a model on the meta device in place, and then give its parameters empty storage where each belongs.

    Args:
        stages: the layers of each stage of a pipeline, as `plan_stages` gives them.
    """
    pipeline = Pipeline(model, stages, section, layout, runtime) if layout.pipeline is not None else None
    model.pipeline = pipeline
    apply_recompute(model, recompute)
    if layout.tensor is not None:
        apply_tensor_parallel(model, layout.tensor)
    if layout.context is not None:
        model.share = ContextShare(layout.context, layout.tensor.size() if layout.tensor is not None else 1)
    for part in parts_of(model):
        part.share, part.head_share = model.share, model.head_share
        if layout.mesh is not None:
            apply_fsdp(part, layout.mesh, runtime.compute_dtype, runtime.reduce_dtype, resolve_reshard(section))
        part.to_empty(device=runtime.device)
    if pipeline is not None:
        pipeline.listen()
    model.tie_weights()
