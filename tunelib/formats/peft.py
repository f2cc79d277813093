"""Adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

The names are those of our parameters after ``base_model.model.``; what is trained in full lies beside (PEFT's ``modules_to_save``). Where
embedding and head are one weight, it lies there under both names, with ``ensure_weight_tying``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunelib import files
from tunelib.adapters import LORA_A, LORA_B, MAGNITUDE, MARKS, scaling_of
from tunelib.config.schema import Lora
from tunelib.errors import FormatError
from tunelib.formats.form import Entry, Form
from tunelib.formats.live import gather
from tunelib.formats.plan import Plan
from tunelib.formats.safetensors_file import read_safetensors
from tunelib.formats.tensors import Region, TensorInfo, Where, blocks_of, same_bits
from tunelib.formats.torch_file import read_torch_file
from tunelib.formats.write import to_json, write_checkpoint
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder
from tunelib.model.families import family_of
from tunelib.parallel.pipeline import over_stages, whole_of

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "base_model.model."
BASE_FILE, TEMPLATE_FILE = "base_fingerprint.json", "chat_template.jinja"
"""Beside PEFT's files: which frozen weights the adapter was trained beside, and the chat template where it was not the base's own."""
MOST_PROBLEMS = 8
# Keys of an adapter_config.json that change nothing of what a stored adapter computes, or that its tensors say themselves.
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "parent_library", "peft_type", "peft_version", "revision", "task_type"),
    *("ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules", "target_parameters"),
    *("lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
)
PLAIN_VALUES = {"bias": "none", "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "rank_pattern": {}, "alpha_pattern": {}}
"""What else has an effect, and the values with which it has none. Other ways to begin an adapter change its base."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder that was looked at.

    Attributes:
        tensors: by the names of our parameters: A, B and magnitudes, and weights trained in full.
        base: the fingerprint of the frozen weights that it was trained beside; empty where the folder does not say.
        quantized: how the weights of adapted layers were stored then.
        chat_template: what it was trained with, where that is not the base's own.
    """

    folder: Path
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    tensors: dict[str, Region]
    base: str = ""
    quantized: str = "none"
    chat_template: str | None = None

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return scaling_of(self.rank, self.alpha, self.use_rslora)

    @cached_property
    def modules(self) -> set[str]:
        """The names of the adapted layers."""
        return {name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)}

    @cached_property
    def whole(self) -> set[str]:
        """The names of weights trained in full."""
        return {name for name in self.tensors if not name.endswith(MARKS)}


def plan_adapter(model: Decoder, section: Lora, base: str, fingerprint: str, chat_template: str | None) -> Plan:
    """How the trained parameters of a model with adapters leave. Collective in a pipeline.

    Args:
        base: where the frozen weights came from.
        fingerprint: of the frozen weights, so that they can be told from others.
        chat_template: what was trained with, where it is not the tokenizer's own.
    """
    family = family_of(model.config)
    own = {name: TensorInfo(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = over_stages(model, own)
    stored = {name: name for name in trained}
    is_tied = model.config.tie_word_embeddings and family.embedding in trained
    if is_tied:
        stored[family.head] = family.embedding
    entries = [Entry(replace(trained[of], name=PREFIX + name), of) for name, of in stored.items()]
    targets = sorted({name.removesuffix(LORA_A).rpartition(".")[2] for name in trained if name.endswith(LORA_A)})
    whole = [name.removesuffix(".weight").rpartition(".")[2] for name in trained if not name.endswith(MARKS)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": targets,
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
    } | ({"ensure_weight_tying": True} if is_tied else {})
    companions: dict[str, str | bytes] = {
        CONFIG_FILE: to_json(config),
        BASE_FILE: to_json({"base": fingerprint, "quantize_base": section.quantize_base}),
    }
    if chat_template is not None:
        companions[TEMPLATE_FILE] = chat_template
    return Plan(Form("hf", {WEIGHTS_FILE: entries}), {}, companions)


def export_adapter(model: Decoder, section: Lora, base: str, fingerprint: str, chat_template: str | None, target: Path, is_main: bool) -> str:
    """Write the trained parameters as a PEFT folder; what it is, in words. Collective; raises SaveError on every rank."""
    plan = plan_adapter(model, section, os.path.abspath(base) if base else "", fingerprint, chat_template)
    parameters = dict(model.named_parameters())

    def read(name: str, where: Where) -> Tensor:
        return whole_of(model, name, gather(parameters[name].detach()) if name in parameters else None)[where]

    write_checkpoint(plan, read, target, is_main)
    return "the adapter, as PEFT has it"


def open_adapter(folder: Path) -> StoredAdapter:
    """Look at an adapter folder of PEFT's or of a run.

    Raises:
        FormatError: a file is missing or damaged, it is no LoRA adapter, or it holds what is not read here, such as biases; CheckpointError:
            its manifest cannot be read.
    """
    path = folder / CONFIG_FILE
    config = files.read_json(path, FormatError, f"does not exist: is {folder} an adapter folder?")
    if files.has_manifest(folder):
        entries = files.read_manifest(folder)["files"]
        if damage := files.find_damage(folder, entries, entries):
            raise FormatError("; ".join(damage))
    rank, alpha = _read_config(config, path)
    is_old = not (folder / WEIGHTS_FILE).exists() and (folder / OLD_WEIGHTS_FILE).exists()
    stored = read_torch_file(folder / OLD_WEIGHTS_FILE) if is_old else read_safetensors(folder / WEIGHTS_FILE)
    tensors = {name.removeprefix(PREFIX): region for name, region in stored.items() if name.startswith(PREFIX)}
    beside = files.read_json(folder / BASE_FILE, FormatError) if (folder / BASE_FILE).is_file() else {}
    try:
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8") if (folder / TEMPLATE_FILE).is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{folder / TEMPLATE_FILE} cannot be read: {error}") from None
    use_rslora, use_dora = config.get("use_rslora") is True, config.get("use_dora") is True
    quantized = str(beside.get("quantize_base", "none"))
    adapter = StoredAdapter(folder, rank, alpha, use_rslora, use_dora, tensors, str(beside.get("base", "")), quantized, template)
    problems = [f"{name} is not a name of PEFT's" for name in stored if not name.startswith(PREFIX)] + _find_problems(adapter)
    if problems:
        raise FormatError(f"{folder}: {_shorten(problems)}")
    return adapter


def _read_config(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """Rank and alpha; raises FormatError, also for a setting that would change what the adapter computes."""
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type = {config.get('peft_type')!r}; LORA is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise FormatError(f"{path}: r = {rank!r} is not a whole number from 1 up")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise FormatError(f"{path}: lora_alpha = {alpha!r} is not a number")
    for name, value in config.items():
        if name in PLAIN_VALUES:
            plain = PLAIN_VALUES[name]
            is_plain = value is None or (value in plain if isinstance(plain, tuple) else value == plain)
        else:
            is_plain = name in WITHOUT_EFFECT or not value
        if not is_plain:
            raise FormatError(f"{path}: {name} = {json.dumps(value)} is not read here; merge that adapter with PEFT, and start from the result")
    try:
        return rank, float(alpha)
    except OverflowError:
        raise FormatError(f"{path}: lora_alpha is too large a number") from None


def _find_problems(adapter: StoredAdapter) -> list[str]:
    """What keeps tensors from making up an adapter, a few words each: every one must be used, and used once."""
    tensors, problems = adapter.tensors, []
    for module in sorted({name.removesuffix(mark) for name in tensors for mark in MARKS if name.endswith(mark)}):
        marks = [LORA_A, LORA_B] + ([MAGNITUDE] if adapter.use_dora else [])
        missing = [module + mark for mark in marks if module + mark not in tensors]
        problems += [f"{name} is missing" for name in missing]
        if module + MAGNITUDE in tensors and not adapter.use_dora:
            problems.append(f"{module + MAGNITUDE} is there, but use_dora is false")
        if not missing:
            a, b = tensors[module + LORA_A].shape, tensors[module + LORA_B].shape
            if len(a) != 2 or len(b) != 2 or a[0] != adapter.rank or b[1] != adapter.rank:
                problems.append(f"{module} has A {list(a)} and B {list(b)}, which are not of rank {adapter.rank}")
    for name, region in tensors.items():
        if not name.endswith(MARKS) and ("lora_" in name or ".base_layer." in name or not name.endswith(".weight")):
            problems.append(f"{name} is not read here; merge that adapter with PEFT, and start from the result")
        elif not all(region.read(part).isfinite().all() for part in blocks_of(region.shape)):
            problems.append(f"{name} holds numbers that are not finite")
    return problems


def tied_tensors(adapter: StoredAdapter, config: ModelConfig) -> dict[str, Region]:
    """An adapter's tensors with a head that is the embedding left out.

    Raises:
        FormatError: it trains head and embedding apart, or one alone, where the model has one weight for both.
    """
    family, tensors = family_of(config), dict(adapter.tensors)
    if config.tie_word_embeddings and adapter.whole & {family.head, family.embedding}:
        head, embedding = tensors.pop(family.head, None), tensors.get(family.embedding)
        parts = list(blocks_of(head.shape)) if head is not None else []
        if head is None or embedding is None or head.shape != embedding.shape or not all(same_bits(head.read(p), embedding.read(p)) for p in parts):
            raise FormatError(f"{adapter.folder} trains head and embedding apart, which are one weight in this model")
    return tensors


def check_adapter(adapter: StoredAdapter, section: Lora, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Region]:
    """The tensors of an adapter that a run starts from, proven to be of this model and these settings.

    Args:
        shapes: of the model's trained parameters.

    Raises:
        FormatError: another rank, scaling or kind of adapter, other modules, or other shapes.
    """
    pairs = {
        "rank": (adapter.rank, section.rank),
        "alpha": (adapter.alpha, section.alpha),
        "use_rslora": (adapter.use_rslora, section.use_rslora),
        "use_dora": (adapter.use_dora, section.use_dora),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise FormatError(f"lora.adapter_path: {adapter.folder} has {name} = {json.dumps(found)}, but lora.{name} is {json.dumps(wanted)}")
    tensors = tied_tensors(adapter, config)
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is not part of the model's adapter" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        raise FormatError(f"lora.adapter_path: {adapter.folder} does not fit this model: {_shorten(problems)}")
    return tensors


def _shorten(problems: list[str]) -> str:
    more = f" (and {len(problems) - MOST_PROBLEMS} more)" if len(problems) > MOST_PROBLEMS else ""
    return "; ".join(problems[:MOST_PROBLEMS]) + more


def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The parameters that are trained, and their shapes."""
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
