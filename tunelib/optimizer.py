"""torch's fused AdamW, its SGD (whose fused kernel takes no sharded tensors), torchao's AdamW with moments of 8 bits; decay of matrices only."""

import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from tunelib.config.schema import Optimizer
from tunelib.errors import ConfigError

BLOCK = 64
"""Numbers of a row that share a scale where moments have 8 bits (Dettmers et al. 2022)."""
MIN_NUMBERS = 4096
"""Of a matrix whose moments are worth 8 bits."""


def build_optimizer(model: nn.Module, section: Optimizer) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters of a model: one group that decays (matrices), one that does not (norms, biases).

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if section.name == "SGD":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    words: dict[str, Any] = {"lr": section.lr, "betas": (section.beta1, section.beta2), "eps": section.eps}
    return load_adamw8bit()(groups, **words) if section.name == "AdamW8bit" else torch.optim.AdamW(groups, fused=True, **words)


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
            elif not isinstance(optimizer, torch.optim.SGD):
                optimizer.state[parameter] = optimizer.fresh_state(parameter)  # type: ignore[attr-defined]  # of `load_adamw8bit`
            elif group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The state of one parameter by name, its storage and not copies; moments of 8 bits as ``NAME.codes`` and ``NAME.scale``.

    Codes (rows, columns) and scales (rows, columns / 64) are cut by rows as the parameter is, so that they fit any such layout.
    """
    for key, value in optimizer.state[parameter].items():
        if value.ndim != 2 or isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD) or not _has_bytes(parameter):
            yield key, value
            continue
        rows, columns = parameter.shape
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        if local.numel():
            parts = {"codes": local.codes, "scale": local.scale.view(len(local), -1)}
        else:  # nothing of the parameter is here
            parts = {"codes": local.to(torch.uint8), "scale": local.new_zeros(0, columns // BLOCK, dtype=torch.float32)}
        for name, part in parts.items():
            shape = torch.Size((rows, part.shape[1]))
            yield f"{key}.{name}", _like(value, part, shape) if isinstance(value, DTensor) else part


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # read by a compiled step
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _has_bytes(parameter: Tensor) -> bool:
    """Whether its moments have 8 bits; a question of its whole shape, so that all layouts answer it alike."""
    return parameter.ndim == 2 and parameter.shape[1] % BLOCK == 0 and parameter.numel() >= MIN_NUMBERS


def _like(whole: DTensor, part: Tensor, shape: torch.Size) -> DTensor:
    """A DTensor of this process's part, cut as another one is."""
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=(shape[1], 1))


@functools.cache
def load_adamw8bit() -> Any:
    """torchao's AdamW8bit with scales that never reach over the end of a row: its own blocks depend on how a matrix is cut.

    Raises:
        ConfigError: torchao is not installed, or fits nothing here.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels for other machines that it did not load
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned
    except ImportError as error:
        raise ConfigError(f"optimizer.name = AdamW8bit needs the package torchao: pip install torchao ({error})") from None
    finally:
        logging.disable(before)

    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash_for_caching")  # which torchao is asked for
    with unset_fake_temporarily():  # the levels are made once, of numbers, which an estimate's tensors do not have
        get_qmap_signed(), get_qmap_unsigned()

    class RowwiseAdamW8bit(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            """torchao's, but for parameters of which nothing is here: torch's cache took their compiled step for that of another process."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    if parameter.grad is None or local.numel():
                        continue
                    if not self.state[parameter]:
                        self.state[parameter] = self.fresh_state(parameter)
                    self.state[parameter]["step"] += 1
                    parameter.grad = None
            return super().step(closure)

        def fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
            buffers = {"exp_avg": self._new_buffer(parameter, True), "exp_avg_sq": self._new_buffer(parameter, False)}
            return {"step": torch.tensor(0.0), **buffers}

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            local = p.to_local() if isinstance(p, DTensor) else p
            if not _has_bytes(p) or not local.numel():
                return torch.zeros_like(p)
            buffer = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device, dtype=p.dtype)
            return _like(p, buffer, p.shape) if isinstance(p, DTensor) else buffer

    return RowwiseAdamW8bit
