"""Plan how a model leaves: which file holds which tensors, under which names, made of which weights; proven before a byte is written."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunelib.errors import FormatError
from tunelib.formats.form import Entry, Form
from tunelib.formats.found import BIN, SAFETENSORS
from tunelib.formats.meta import plan_meta, to_meta, with_head
from tunelib.formats.tensors import Bounds, TensorInfo, bounds_of, overlap, shape_of
from tunelib.model.config import ModelConfig
from tunelib.model.families import family_of

KINDS = ("hf", "meta", "dcp", "torch", "gguf")
MAX_SHARD_BYTES = 5 * 10**9
TORCH_FILE, GGUF_FILE = "model.pt", "model.gguf"
Companions = dict[str, bytes | str]
"""Further files: name → content, read when the plan is made: at the end of a long run the source may be gone."""


@dataclass(frozen=True)
class Plan:
    """Everything about a folder to be written but the weights.

    Attributes:
        fields: the model as a config.json says it.
        companions: the files beside the weights, config and index among them.
        notes: what the target cannot hold, or holds otherwise, a sentence each.
    """

    form: Form
    fields: dict[str, Any]
    companions: Companions
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.info.nbytes for entries in self.form.files.values() for entry in entries)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type that each weight leaves in."""
        return {entry.source: entry.info.dtype for entries in self.form.files.values() for entry in entries}


@dataclass(frozen=True)
class Wish:
    """How a model is to be laid out where nothing says so yet.

    Attributes:
        max_shard_bytes: of one file (kinds "torch" and "meta" have no other choice).
        model_parallel: files that Meta's form divides every tensor over.
        meta_names: write a DCP folder with Meta's names and rotary pairs, as torchtitan does.
        prefix: what stands before every name in a DCP folder.
    """

    kind: str
    max_shard_bytes: int = MAX_SHARD_BYTES
    model_parallel: int = 1
    meta_names: bool = False
    prefix: str = ""


def plan_form(wish: Wish, weights: Mapping[str, TensorInfo], config: ModelConfig) -> Form:
    """Lay a model's weights out in files.

    Args:
        weights: by Hugging Face name, without a tied head, with the types that they are to have.

    Raises:
        FormatError: a form that these weights do not fit, such as model-parallel files that do not divide them.
    """
    if wish.kind == "meta":
        return plan_meta(weights, config, wish.model_parallel)
    whole = [Entry(info, name) for name, info in weights.items()]
    if wish.kind == "torch":
        return Form("torch", {TORCH_FILE: whole})
    if wish.kind == "dcp":
        if wish.meta_names:
            whole = [to_meta(Entry(info, name), config) for name, info in with_head(weights, config).items()]
        whole = [replace(entry, info=replace(entry.info, name=wish.prefix + entry.info.name)) for entry in whole]
        groups = _group(whole, wish.max_shard_bytes)
        named = {f"__0_{number}.distcp": group for number, group in enumerate(groups)}
        return Form("dcp", named, is_meta=wish.meta_names, prefix=wish.prefix)
    assert wish.kind == "hf", wish.kind
    groups = _group(whole, wish.max_shard_bytes)
    if len(groups) == 1:
        return Form("hf", {SAFETENSORS: groups[0]})
    files = {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, start=1)}
    return Form("hf", files, index={})


def form_like(form: Form, weights: Mapping[str, TensorInfo], config: ModelConfig) -> Form:
    """The same files and names with these weights' types and shapes.

    Raises:
        FormatError: it names other weights than there are, or divides what does not divide.
    """
    family = family_of(config)

    def fit(entry: Entry) -> Entry:
        info = weights.get(entry.source) or (weights[family.embedding] if entry.source == family.head else None)
        if info is None:
            raise FormatError(f"{entry.info.name}, which the checkpoint to be like holds, is not part of this model")
        if not entry.where:
            return replace(entry, info=TensorInfo(entry.info.name, info.dtype, info.shape))
        where = tuple(_scale(part, number, form, entry, info.shape) for number, part in enumerate(entry.where))
        return replace(entry, info=TensorInfo(entry.info.name, info.dtype, shape_of(where, info.shape)), where=where)

    fitted = {file: [fit(entry) for entry in entries] for file, entries in form.files.items()}
    return replace(form, files=fitted)


def check_form(form: Form, weights: Mapping[str, TensorInfo], config: ModelConfig, target: str) -> None:
    """Prove that a form holds every element of every weight, each once in a file, and nothing else.

    Raises:
        FormatError: naming what is missing or written twice.
    """
    family = family_of(config)
    parts: dict[str, set[Bounds]] = {}
    homes: dict[str, str] = {}
    for file, entries in form.files.items():
        names = [entry.info.name for entry in entries]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise FormatError(f"{target}: {twice} would lie in {file} twice")
        for entry in entries:
            weight = weights.get(entry.source) or weights[family.embedding]
            assert entry.info.shape == shape_of(entry.where, weight.shape), f"{entry} of {weight}"
            parts.setdefault(entry.source, set()).add(tuple(bounds_of(entry.where, weight.shape)))
            if form.kind != "meta" and (home := homes.setdefault(entry.info.name, file)) != file:
                raise FormatError(f"{target}: {entry.info.name} would lie in {home} and {file}")
    for name, info in weights.items():
        held = parts.get(name, set())
        covered = sum(math.prod(last - first for first, last in part) for part in held)
        if covered != math.prod(info.shape):
            raise FormatError(f"{target}: {name} would be written with {covered} of its {math.prod(info.shape)} elements")
        if any(overlap(one, other) for one, other in itertools.combinations(held, 2)):
            raise FormatError(f"{target}: {name} would be written in parts that overlap, so that others are missing")


def parse_size(text: str) -> int:
    """Bytes of a text such as "5GB", "200MB" or "1GiB"; raises FormatError."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if not size:
        raise FormatError(f"{text!r} is not a size; write one such as 5GB or 500MiB")
    return size


def index_of(form: Form) -> dict[str, Any] | None:
    """The index of a Hugging Face folder's files: as it came but for the sizes, or a new one where there are several."""
    if form.index is None:
        return None
    weight_map = {entry.info.name: file for file, entries in form.files.items() for entry in entries}
    old = form.index.get("weight_map", sorted(weight_map))
    metadata = form.index.get("metadata")
    total = sum(entry.info.nbytes for entries in form.files.values() for entry in entries)
    return {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {name: weight_map[name] for name in old if name in weight_map},
    }


def index_name(form: Form) -> str:
    """The name of a Hugging Face folder's index."""
    return f"{BIN if any(file.endswith('.bin') for file in form.files) else SAFETENSORS}.index.json"


def _scale(part: slice, dim: int, form: Form, entry: Entry, shape: tuple[int, ...]) -> slice:
    """A part of a dimension that may have another size now; all files' parts together were the old size."""
    old = max(other.where[dim].stop for entries in form.files.values() for other in entries if other.source == entry.source and other.where)
    new = shape[dim]
    if old != new and (part.start * new % old or part.stop * new % old):
        raise FormatError(f"{entry.source} with {new} rows cannot be divided as it was with {old}")
    return slice(part.start * new // old, part.stop * new // old)


def _group(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    """In order, as many to a group as fit."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.info.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.info.nbytes
    return groups
