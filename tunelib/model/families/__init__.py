"""The model families: a file each, found by the ``architectures`` entry of a config.json."""

from types import ModuleType
from typing import Any

from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig
from tunelib.model.families import llama

FAMILIES: dict[str, ModuleType] = {"LlamaForCausalLM": llama}


def parse_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        fields: the JSON object.
        where: the file, for messages.

    Raises:
        FormatError: an unknown architecture, a missing field, or a field that asks for what is not built.
    """
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(FAMILIES):
        raise FormatError(f"{where}: architectures = {architectures!r} is not one of those built: {', '.join(FAMILIES)}")
    return FAMILIES[architectures[0]].parse_config(fields, where)


def family_of(config: ModelConfig) -> ModuleType:
    """The module of a model's family, with its tables of names."""
    return FAMILIES[config.architecture]


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, for an export that has none to copy."""
    return family_of(config).hf_config(config)
