"""How a model is laid out in files: which tensors lie where, under which names, made of which weights."""

from dataclasses import dataclass
from typing import Any

from tunelib.formats.tensors import TensorInfo, Where


@dataclass(frozen=True)
class Entry:
    """One tensor as a file holds it.

    Attributes:
        info: under its stored name.
        source: the Hugging Face name of the weight that it is, or is a part of.
        where: which part.
        head_dim: above 0, its rows lie in Meta's order, by heads of so many rows.
    """

    info: TensorInfo
    source: str
    where: Where = ()
    head_dim: int = 0


@dataclass(frozen=True)
class Form:
    """How a model is laid out in files.

    Attributes:
        kind: "hf", "meta", "dcp" or "torch".
        files: file name → what it holds, in order.
        index: the JSON that says which file holds which tensor, where there is one (kind "hf").
        is_meta: whether names and rotary pairs are Meta's.
        prefix: what stands before every name.
    """

    kind: str
    files: dict[str, list[Entry]]
    index: dict[str, Any] | None = None
    is_meta: bool = False
    prefix: str = ""
