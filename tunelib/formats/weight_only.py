"""Weights of linear layers in eight or four bits, through torchao: made from a whole model, written once, read back.

The written folder is as transformers writes it: a config.json with a quantization_config, and the parts of each tensor in a safetensors file.
The head and the embedding stay as they are.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunelib import files
from tunelib.errors import ConfigError, FormatError
from tunelib.formats.found import CONFIG_FILE, SAFETENSORS
from tunelib.formats.write import commit, to_json
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.model.families import parse_config

FIELD, METHOD = "quantization_config", "torchao"
KINDS = ("int8", "int4")
GROUP = 32
"""Weights of a row that share a scale, in four bits."""


def quantize_weights(model: Decoder, kind: str) -> None:
    """Round the weights of a whole model's linear layers to "int8", a scale for each row, or "int4", a scale for each 32 weights.

    On a GPU in bfloat16, four bits are packed for torchao's kernel; elsewhere each takes a byte.

    Raises:
        ConfigError: torchao is not installed, or rows cannot be divided.
    """
    linear = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    if kind == "int4" and (odd := [f"{name} has {module.in_features}" for name, module in linear.items() if module.in_features % GROUP]):
        raise ConfigError(f"int4 has a scale for each {GROUP} weights of a row, and {odd[0]} inputs: take int8")
    with _torchao():
        from torchao.quantization import quantize_

        quantize_(model.model, _torchao_config(kind, model.lm_head.weight), lambda _module, name: name in linear)


def _torchao_config(kind: str, like: torch.Tensor) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if like.is_cuda and like.dtype == torch.bfloat16:
        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    return IntxWeightOnlyConfig(getattr(torch, "int4"), PerGroup(GROUP))  # noqa: B009  (torch's stubs lack it)


def write_quantized(model: Decoder, kind: str, fields: dict[str, Any], companions: dict[str, str | bytes], target: Path) -> None:
    """Write a model on the CPU that `quantize_weights` has rounded.

    Args:
        fields: the model as a config.json says it.
        companions: the other files of the folder.

    Raises:
        OSError: it cannot be written.
    """
    with _torchao():
        from safetensors.torch import save_file
        from torchao.core.config import config_to_dict
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        tensors, metadata = flatten_tensor_state_dict({name: tensor for name, tensor in model.state_dict().items() if name not in tied})
        how = {"quant_method": METHOD, "quant_type": {"default": config_to_dict(_torchao_config(kind, model.lm_head.weight))}}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    fields = {**{name: value for name, value in fields.items() if name != "torch_dtype"}, "dtype": dtype, FIELD: how}
    staging = files.make_staging(target)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / SAFETENSORS, {"format": "pt", **metadata})
        files.sync_path(staging / SAFETENSORS)
        for name, content in {**companions, CONFIG_FILE: to_json(fields)}.items():
            files.write_file(staging / name, content)
        commit(staging, target, files.describe_files(staging, files.list_files(staging)), "", replace=False)
    finally:
        files.remove_folder(staging)


def is_quantized(folder: Path) -> bool:
    """Whether a folder's config.json says that torchao has quantised its weights."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    how = files.read_json(folder / CONFIG_FILE, FormatError).get(FIELD)
    return isinstance(how, dict) and how.get("quant_method") == METHOD


def read_quantized(folder: Path) -> tuple[Decoder, dict[str, Any]]:
    """The model that `write_quantized` or transformers wrote, on the CPU, and the fields of its config.json.

    Raises:
        FormatError: a damaged file, or weights that are not those of the model.
    """
    fields = files.read_json(folder / CONFIG_FILE, FormatError)
    if files.has_manifest(folder):
        entries = files.read_manifest(folder)["files"]
        if damage := files.find_damage(folder, entries, entries):
            raise FormatError("; ".join(damage))
    plain = {name: value for name, value in fields.items() if name != FIELD}
    config = parse_config(plain, str(folder / CONFIG_FILE))
    with _torchao():
        from safetensors import SafetensorError, safe_open
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        try:
            with safe_open(folder / SAFETENSORS, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
                metadata = file.metadata() or {}
            found, left = unflatten_tensor_state_dict(stored, metadata)
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise FormatError(f"{folder / SAFETENSORS} cannot be read as torchao's: {error}") from None
    model = build_on_meta(config, next(iter(tensor.dtype for tensor in found.values()), torch.float32))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    known = {*shapes, "lm_head.weight"} if config.tie_word_embeddings else {*shapes}
    problems = [f"{name} is missing" for name in shapes if name not in found]
    problems += [f"{name} is not part of the model" for name in [*found, *left] if name not in known]
    problems += [
        f"{name} has shape {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise FormatError(f"{folder} does not fit its config: {'; '.join(problems[:5])}")
    for name in shapes:
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, nn.Parameter(found[name], requires_grad=False))
    model.tie_weights()
    return model, plain


@contextlib.contextmanager
def _torchao() -> Iterator[None]:
    """torchao, without what it says about itself; ConfigError where it is not there."""
    logger = logging.getLogger("torchao")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchao"):
            raise
        raise ConfigError('int8 and int4 are torchao\'s: pip install "torchao>=0.17", or the extra "torchao"') from None
    finally:
        logger.setLevel(before)
