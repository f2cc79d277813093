"""Adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

The names are those of our parameters after ``base_model.model.``; what is trained in full lies beside (PEFT's ``modules_to_save``).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunelib import files
from tunelib.adapters import AdaptedLinear
from tunelib.config.schema import Lora
from tunelib.errors import FormatError
from tunelib.formats.form import Entry, Form
from tunelib.formats.live import gather
from tunelib.formats.plan import Plan
from tunelib.formats.safetensors_file import read_safetensors
from tunelib.formats.tensors import Region, TensorInfo
from tunelib.formats.write import to_json, write_checkpoint
from tunelib.model.decoder import Decoder

CONFIG_FILE, WEIGHTS_FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BASE_FINGERPRINT = "base_fingerprint.json"
MOST_PROBLEMS = 8


def plan_adapter(model: nn.Module, section: Lora, base: str, fingerprint: str) -> Plan:
    """How the trained parameters of a model with adapters leave.

    Args:
        base: where the frozen weights came from.
        fingerprint: of the frozen weights, so that they can be told from others.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    entries = [Entry(TensorInfo(PREFIX + name, parameter.dtype, tuple(parameter.shape)), name) for name, parameter in trained.items()]
    targets = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, AdaptedLinear)})
    whole = [name for name, is_trained in (("embed_tokens", section.train_embeddings), ("lm_head", section.train_lm_head)) if is_trained]
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
    }
    return Plan(Form("hf", {WEIGHTS_FILE: entries}), {}, {CONFIG_FILE: to_json(config), BASE_FINGERPRINT: to_json({"base": fingerprint})})


def export_adapter(model: Decoder, section: Lora, base: str, fingerprint: str, target: Path, is_main: bool) -> str:
    """Write the trained parameters as a PEFT folder; what it is, in words. Collective; raises SaveError on every rank."""
    plan = plan_adapter(model, section, os.path.abspath(base) if base else "", fingerprint)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_checkpoint(plan, lambda name, where: gather(parameters[name])[where], target, is_main)
    return "the adapter, as PEFT has it"


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Region]]:
    """An adapter's config, and its tensors by the names of our parameters.

    Raises:
        FormatError: a file is missing or damaged, or it is no LoRA adapter.
    """
    config = files.read_json(folder / CONFIG_FILE, FormatError, f"does not exist: is {folder} an adapter folder?")
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{folder / CONFIG_FILE}: peft_type = {config.get('peft_type')!r}; LORA is read")
    for name, only in (("bias", "none"), ("fan_in_fan_out", False), ("rank_pattern", {}), ("alpha_pattern", {}), ("layers_to_transform", None)):
        if config.get(name, only) not in (only, None):
            raise FormatError(f"{folder / CONFIG_FILE}: {name} = {config[name]!r} is not supported; only {only!r} is")
    regions = read_safetensors(folder / WEIGHTS_FILE)
    if strange := next((name for name in regions if not name.startswith(PREFIX)), None):
        raise FormatError(f"{folder / WEIGHTS_FILE}: {strange} is not a name of PEFT's")
    return config, {name.removeprefix(PREFIX).replace(".base_layer.", "."): region for name, region in regions.items()}


def check_adapter(folder: Path, section: Lora, shapes: Mapping[str, torch.Size]) -> dict[str, Region]:
    """The tensors of an adapter that a run starts from, proven to be of this model and these settings.

    Args:
        shapes: of the model's trained parameters.

    Raises:
        FormatError: another rank, scaling or kind of adapter, other modules, or other shapes.
    """
    config, regions = read_adapter(folder)
    wanted = {
        "r": section.rank,
        "lora_alpha": section.alpha,
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
    }
    defaults = {"use_rslora": False, "use_dora": False}
    keys = {"r": "rank", "lora_alpha": "alpha"}
    for name, value in wanted.items():
        if (found := config.get(name, defaults.get(name))) != value:
            raise FormatError(f"lora.adapter_path: {folder} has {name} = {json.dumps(found)}, but lora.{keys.get(name, name)} is {json.dumps(value)}")
    problems = [f"{name} is missing" for name in shapes if name not in regions]
    problems += [f"{name} is not part of the model's adapter" for name in regions if name not in shapes]
    problems += [
        f"{name} has shape {list(regions[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in regions and regions[name].shape != tuple(shape)
    ]
    if problems:
        more = f" (and {len(problems) - MOST_PROBLEMS} more)" if len(problems) > MOST_PROBLEMS else ""
        raise FormatError(f"lora.adapter_path: {folder} does not fit this model: {'; '.join(problems[:MOST_PROBLEMS])}{more}")
    return regions
