"""Merge an adapter into the weights that it was trained beside: a conversion that adds to what it reads."""

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from tunelib import files
from tunelib.adapters import is_of_adapter, merge
from tunelib.errors import FormatError
from tunelib.formats.convert import Conversion, plan_conversion
from tunelib.formats.fingerprint import fingerprint_stored
from tunelib.formats.found import find_kind
from tunelib.formats.peft import BASE_FINGERPRINT, read_adapter
from tunelib.formats.source import StoredModel
from tunelib.formats.tensors import Region, Untouched, Where

LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def plan_merge(base_path: Path, adapter_path: Path, target: Path, dtype: str = "") -> Conversion:
    """Look at a base and an adapter, and prove that they belong together; the target has the base's form.

    Args:
        dtype: of all tensors; empty for those that they have.

    Raises:
        FormatError: the adapter is none, is of another model, or was trained beside other weights, such as ones that it was merged into.
    """
    config, tensors = read_adapter(adapter_path)
    conversion = plan_conversion(base_path, target, find_kind(base_path), dtype)
    base = conversion.source
    adapted = {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}
    whole = {name for name in tensors if not is_of_adapter(name)}
    _check_shapes(base, adapter_path, adapted, tensors)
    notes = list(conversion.notes)
    if (adapter_path / BASE_FINGERPRINT).is_file():
        expected = files.read_json(adapter_path / BASE_FINGERPRINT, FormatError).get("base")
        if fingerprint_stored(base, [name for name in base.weights if name not in whole]) != expected:
            raise FormatError(f"{adapter_path} was trained beside other weights than {base_path} holds: is it merged already, or another base?")
    else:
        notes.append(f"{adapter_path} does not say beside which weights it was trained: see to it that these are not merged already")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])

    @lru_cache(maxsize=1)  # where files hold parts of a tensor, the others' come next
    def read_merged(module: str) -> Tensor:
        magnitude = tensors.get(module + MAGNITUDE)
        low, high = tensors[module + LORA_A].read(), tensors[module + LORA_B].read()
        return merge(base.read(f"{module}.weight"), low, high, scaling, magnitude.read() if magnitude else None)

    def read(name: str, where: Where) -> Tensor | Untouched:
        if name in whole:
            return tensors[name].read(where)
        module = name.removesuffix(".weight")
        return read_merged(module)[where] if module in adapted else conversion.read(name, where)

    return replace(conversion, notes=tuple(notes), read=read)


def _check_shapes(base: StoredModel, adapter_path: Path, adapted: set[str], tensors: dict[str, Region]) -> None:
    for module in sorted(adapted):
        info = base.weights.get(f"{module}.weight")
        if info is None:
            raise FormatError(f"{adapter_path} has an adapter for {module}, which {base.path} does not have")
        a, b = tensors[module + LORA_A].shape, tensors.get(module + LORA_B)
        if b is None or (b.shape[0], a[1], a[0]) != (*info.shape, b.shape[1]):
            raise FormatError(f"{adapter_path}: the adapter for {module} has other sizes than its weight, {list(info.shape)}, in {base.path}")
