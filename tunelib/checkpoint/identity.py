"""What must be the same for a run to go on, held against what was saved."""

import os
from dataclasses import asdict
from typing import Any

from tunelib.config.schema import Lora
from tunelib.errors import CheckpointError

CONSEQUENCES = "consequences"
"""Name of the part of a run's identity that follows from the rest; told only where nothing else has changed."""


def describe_identity(model: dict[str, Any], initial_load_path: str, lora: Lora, rest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same for a run to go on, and the part of it that a seed checkpoint must share: name → value or digest.

    Args:
        model: the fields of its config.json.
        rest: what else decides the run: data, order, optimizer.

    Returns:
        The part that a seed shares, then all.
    """
    origin = {
        "model": {name: value for name, value in model.items() if name not in ("dtype", "torch_dtype")},
        "checkpoint.initial_load_path": os.path.abspath(initial_load_path) if initial_load_path else "",
    }
    section = {**asdict(lora), "target_modules": list(lora.target_modules)}
    section["adapter_path"] = os.path.abspath(lora.adapter_path) if lora.adapter_path else ""
    adapters = {f"lora.{name}": value for name, value in section.items() if name != "save_adapter_weights_only"} if lora.enable else {}
    return origin, {**origin, **rest, **adapters}


def check_identity(saved: dict[str, Any], today: dict[str, Any]) -> None:
    """Stop a run that would go on with another model, other data or another order.

    Raises:
        CheckpointError: naming each thing that changed.
    """
    changed = list_changes("", saved, today)
    causes = {name: line for name, line in changed.items() if not name.startswith(CONSEQUENCES)}
    if lines := list((causes or changed).values()):
        holds_all = not any(name.startswith("lora.") for name in {*saved, *today})
        weights = " (and the checkpoint's weights to --checkpoint.initial_load_path)" if holds_all else ""
        raise CheckpointError(
            "the checkpoint belongs to another run; since then there changed:\n" + "\n".join(lines) + "\n"
            f"Set them back, or give --job.dump_folder a new folder{weights}, or start over with --checkpoint.resume never."
        )


def check_base(saved: str, today: str, whose: str) -> None:
    """Stop a run that would go on with adapters that were trained beside other frozen weights; raises CheckpointError on every rank.

    Args:
        whose: where the adapters come from, for the message.
    """
    if saved != today:
        error = CheckpointError(
            f"the adapters of {whose} were trained beside other frozen weights than checkpoint.initial_load_path has (or they are merged into them "
            "already): put those there, or give --job.dump_folder a new folder and start with fresh adapters"
        )
        error.agreed = True
        raise error


def list_changes(above: str, saved: dict[str, Any], today: dict[str, Any]) -> dict[str, str]:
    """Name → line for each thing that is not what it was; of a table only the keys that changed."""
    changed: dict[str, str] = {}
    for name in sorted({*saved, *today}):
        then, now = saved.get(name), today.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            changed |= list_changes(f"{above}{name}: ", then, now)
        elif then != now:
            changed[above + name] = f"  {above}{name}: {then!r} then, {now!r} now"
    return changed
