"""torch's fused AdamW, and its SGD (whose fused kernel takes no sharded tensors), with weight decay on matrices only."""

import torch
from torch import nn

from tunelib.config.schema import Optimizer


def build_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters of a model: one group that decays (matrices), one that does not (norms, biases)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if section.name == "AdamW":
        return torch.optim.AdamW(groups, lr=section.lr, betas=(section.beta1, section.beta2), eps=section.eps, fused=True)
    return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)


def prepare_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would make, without taking a step; for loading into.

    torch makes the state lazily, and its own helper for this takes a hidden step with lr 0, after which training differs.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
            elif group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
