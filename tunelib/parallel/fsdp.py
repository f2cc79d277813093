"""FSDP2: parameters, gradients and optimizer state sharded, one group per layer and one for the rest."""

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tunelib.model.decoder import Decoder
from tunelib.parallel.pipeline import parts_of


def apply_fsdp(model: Decoder, mesh: DeviceMesh, dtypes: MixedPrecisionPolicy, reshard_after_forward: bool, offloaded: bool) -> None:
    """Shard a model in place. Gradients are summed over ranks, never averaged (law 1).

    Every micro-batch's gradients are reduced at once: to keep them until the last would hold the whole model's on each rank.

    Args:
        offloaded: shards lie in the main memory, and go to the GPU to be gathered.
    """
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy()
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=dtypes, reshard_after_forward=reshard_after_forward, offload_policy=offload)
    # The root's parameters are needed again at once in the backward pass.
    fully_shard(model, mesh=mesh, mp_policy=dtypes, reshard_after_forward=False, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextlib.contextmanager
def forward_only(model: Decoder) -> Iterator[None]:
    """A block of forward passes without gradients. After it the parameters are shards again: FSDP2 leaves some gathered for a
    backward pass that does not come."""
    was_training = model.training
    model.eval()  # adapters leave nothing out
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for module in (module for part in parts_of(model) for module in part.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
