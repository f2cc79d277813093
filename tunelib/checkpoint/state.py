"""The state of a run as a flat dict of tensors, and the small facts beside it.

Model tensors lie flat at the top under their Hugging Face names. ``optimizer.<parameter>.<what>`` holds the optimizer's,
``rng.<rank>.<device>`` each rank's random state. Nothing but tensors goes into DCP; the rest is `RunState`, plain JSON.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from tunelib.errors import CheckpointError
from tunelib.files import read_json
from tunelib.optimizer import prepare_state, state_tensors

STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands. ``step`` is also the data position: the next step's rows follow from it.

    Attributes:
        tokens_seen: positions trained on, padding not counted.
        world_size: processes that wrote it, and on what they computed: ``device`` is "cpu" or "cuda".
        identity: what must be the same for a run to go on: name → digest or value.
        base: fingerprint of the frozen weights, which are not saved; empty where all are trained.
        compiled: whether layers were compiled.
        degrees: of the layout that wrote it, by name.
        passed_over: steps that were taken without an update, because their numbers were not finite.
        validation_loss: of these weights; None where they were not validated.
        best_step, best_loss: of the validation with the lowest loss so far; num_worse: how many there were since then.
        streams: where each data rank's stream stands, by rank; None for data whose place follows from the step.
    """

    step: int
    tokens_seen: int
    world_size: int
    device: str
    identity: dict[str, Any]
    streams: list[Any] | None = None
    base: str = ""
    compiled: bool = False
    degrees: dict[str, int] = field(default_factory=dict)
    passed_over: list[int] = field(default_factory=list)
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    num_worse: int = 0

    def continued_by(self, begun: "RunState") -> "RunState":
        """What a run is that begins as told, at this one's place and with its validations."""
        begun = replace(begun, step=self.step, tokens_seen=self.tokens_seen)
        return replace(begun, best_step=self.best_step, best_loss=self.best_loss, num_worse=self.num_worse)

    def to_json(self) -> str:
        """For state.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_run_state(folder: Path) -> RunState:
    """The facts of a full checkpoint; raises CheckpointError."""
    fields = read_json(folder / STATE_FILE, CheckpointError)
    for name, kind in get_type_hints(RunState).items():
        if name in fields and not _is_of(kind, fields[name]):
            raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {name} is {str(fields[name])[:50]}")
    try:
        return RunState(**fields)
    except TypeError as error:  # a field too many or too few
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}") from None


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value that JSON gave is of an annotated type, as far as its outermost layer shows."""
    kinds = tuple(get_origin(each) or each for each in (get_args(kind) if get_origin(kind) is UnionType else (kind,)))
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, a tied one once; their storage, not copies. Frozen ones are named by their fingerprint alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name; their storage, not copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"optimizer.{names[parameter]}.{key}": value for parameter in optimizer.state for key, value in state_tensors(optimizer, parameter)}


def rng_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's random state."""
    tensors = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore_rng(tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Set this rank's random state from what `rng_tensors` gave."""
    torch.set_rng_state(tensors[f"rng.{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"], device)


def tensors_to_load(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, device: torch.device, same_layout: bool) -> dict[str, Tensor]:
    """Everything of a full checkpoint, as storage to load into; random state only where the ranks are the same."""
    prepare_state(optimizer)
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    return tensors | rng_tensors(rank, device) if same_layout else tensors
