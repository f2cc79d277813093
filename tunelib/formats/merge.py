"""Merge an adapter into the weights that it was trained beside: a conversion that adds to what it reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tunelib.adapters import LORA_A, LORA_B, MAGNITUDE, merge
from tunelib.errors import FormatError
from tunelib.formats.convert import Conversion, plan_conversion
from tunelib.formats.fingerprint import fingerprint_stored
from tunelib.formats.found import find_kind
from tunelib.formats.peft import StoredAdapter, open_adapter, tied_tensors
from tunelib.formats.source import StoredModel
from tunelib.formats.tensors import Region, Untouched, Where
from tunelib.model.families import family_of
from tunelib.quantize import dequantize, quantize


@dataclass(frozen=True)
class Merged:
    """What an adapter makes of a base.

    Attributes:
        read: gives a weight, or its part, as the adapter has it; None for one that it leaves alone.
        notes: what a person should know of it.
    """

    read: Callable[[str, Where], Tensor | None]
    notes: tuple[str, ...]


def plan_merge(base_path: Path, adapter_path: Path, target: Path, dtype: str = "") -> Conversion:
    """Look at a base and an adapter, and prove that they belong together; the target has the base's form.

    Args:
        dtype: of all tensors; empty for those that they have.

    Raises:
        FormatError: the adapter is none, is of another model, or was trained beside other weights, such as ones that it was merged into.
    """
    adapter = open_adapter(adapter_path)
    conversion = plan_conversion(base_path, target, find_kind(base_path), dtype, chat_template=adapter.chat_template)
    merged = merge_stored(conversion.source, adapter)

    def read(name: str, where: Where) -> Tensor | Untouched:
        own = merged.read(name, where)
        return conversion.read(name, where) if own is None else own

    return replace(conversion, notes=(*conversion.notes, *merged.notes), read=read)


def merge_stored(base: StoredModel, adapter: StoredAdapter) -> Merged:
    """The weights of a base with what an adapter adds to them, made as they are read.

    Where the adapter was trained beside a quantised base, the layers that it adapts are those of that base.

    Raises:
        FormatError: the adapter is of another model, or was trained beside other weights.
    """
    family, is_tied = family_of(base.config), base.config.tie_word_embeddings
    tensors = tied_tensors(adapter, base.config)
    _check_shapes(base, adapter, tensors)
    notes = []
    if adapter.base:
        if fingerprint_stored(base, [name for name in base.weights if name not in adapter.whole]) != adapter.base:
            raise FormatError(f"{adapter.folder} was trained beside other weights than {base.path} holds: is it merged already, or another base?")
    else:
        notes.append(f"{adapter.folder} does not say beside which weights it was trained: see to it that these are not merged already")
    if adapter.quantized != "none":
        notes.append(f"{adapter.folder} was trained beside a base in {adapter.quantized}: the weights that it adapts are merged as rounded to that")

    @lru_cache(maxsize=1)  # where files hold parts of a tensor, the others' come next
    def merge_whole(module: str) -> Tensor:
        weight = base.read(f"{module}.weight")
        if adapter.quantized != "none":
            weight = dequantize(quantize(weight), torch.promote_types(weight.dtype, torch.float32))
        magnitude = tensors[module + MAGNITUDE].read() if adapter.use_dora else None
        return merge(weight, tensors[module + LORA_A].read(), tensors[module + LORA_B].read(), adapter.scaling, magnitude)

    def read(name: str, where: Where) -> Tensor | None:
        name = family.EMBEDDING if is_tied and name == family.HEAD else name
        if name in tensors:
            return tensors[name].read(where)
        module = name.removesuffix(".weight")
        return merge_whole(module)[where] if module in adapter.modules else None

    return Merged(read, tuple(notes))


def _check_shapes(base: StoredModel, adapter: StoredAdapter, tensors: dict[str, Region]) -> None:
    for module in sorted(adapter.modules):
        info = base.weights.get(f"{module}.weight")
        if info is None:
            raise FormatError(f"{adapter.folder} has an adapter for {module}, which {base.path} does not have")
        if info.shape != (tensors[module + LORA_B].shape[0], tensors[module + LORA_A].shape[1]):
            raise FormatError(f"{adapter.folder}: the adapter for {module} has other sizes than its weight, {list(info.shape)}, in {base.path}")
    for name in sorted(adapter.whole & tensors.keys()):
        info = base.weights.get(name)
        if info is None or info.shape != tensors[name].shape:
            found = f"is {list(info.shape)}" if info is not None else "is not there"
            own = f"{adapter.folder} has {name} {list(tensors[name].shape)}"
            raise FormatError(f"{own}, which {found} in {base.path}; if the run resized it, take its export")
