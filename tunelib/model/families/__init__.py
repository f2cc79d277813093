"""The model families: a file each, found by the ``architectures`` entry of a config.json."""

from typing import Any

from tunelib.errors import FormatError
from tunelib.model.config import ModelConfig
from tunelib.model.families import gemma2, llama, mistral, olmo2, phi3, qwen2, qwen3
from tunelib.model.families.family import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Gemma2ForCausalLM": gemma2.FAMILY,
    "Olmo2ForCausalLM": olmo2.FAMILY,
}


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


def family_of(config: ModelConfig) -> Family:
    """A model's family, with its tables of names."""
    return FAMILIES[config.architecture]


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, for an export that has none to copy."""
    return family_of(config).hf_config(config)
