"""The tables of the config room point at things that exist."""

import pytest

from tunelib.config.effect import EXCLUSIVE, NEEDS
from tunelib.config.fields import FIELDS, SECTIONS, TABLE_FIELDS
from tunelib.config.renamed import RENAMED, REPLACED, UNBUILT
from tunelib.config.schema import Model, RopeScaling
from tunelib.config.sizes import SIZES

MILLIONS = {
    "llama2-7b": 6738, "llama2-13b": 13016, "llama2-70b": 68977, "llama3-8b": 8030, "llama3-70b": 70554,
    "llama3.1-8b": 8030, "llama3.1-70b": 70554, "llama3.1-405b": 405853, "llama3.2-1b": 1236, "llama3.2-3b": 3213,
    "llama3.3-70b": 70554, "smollm2-135m": 135, "smollm2-360m": 362, "smollm2-1.7b": 1711, "tinyllama-1.1b": 1100,
}  # fmt: skip
"""Published parameter counts, in millions."""


def test_names_of_other_eras_lead_to_keys_of_today() -> None:
    assert [old for old, today in RENAMED.items() if today not in FIELDS] == []
    tables = [*RENAMED, *REPLACED, *UNBUILT]
    assert len(set(tables)) == len(tables)
    assert [name for name in tables if name in FIELDS or name in SECTIONS] == []


def test_effects_speak_of_keys_that_exist() -> None:
    for need in NEEDS:
        assert {need.switch, *need.keys} <= FIELDS.keys() | TABLE_FIELDS.keys()
        assert need.keys
        assert need.switch not in need.keys
        choices = (FIELDS | TABLE_FIELDS)[need.switch].choices
        assert not choices or set(need.off) < set(choices)
    assert {key for pair in EXCLUSIVE for key in pair} <= FIELDS.keys() | TABLE_FIELDS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_the_published_number_of_parameters(name: str) -> None:
    assert round(count_parameters(SIZES[name]) / 1e6) == MILLIONS[name]


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_use_fields_of_the_schema(name: str) -> None:
    size = dict(SIZES[name])
    scaling = size.pop("rope_scaling", {})
    assert size.keys() <= vars(Model()).keys() - {"flavor", "tokenizer_path"}
    assert not scaling or scaling.keys() == vars(RopeScaling()).keys()  # type: ignore[union-attr]  # a dict


def count_parameters(size: dict[str, object]) -> int:
    number: dict[str, int] = {name: value for name, value in size.items() if isinstance(value, int)}
    hidden, heads = number["hidden_size"], number["num_attention_heads"]
    key_values = hidden // heads * number["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * key_values + 3 * hidden * number["intermediate_size"] + 2 * hidden
    embeddings = number["vocab_size"] * hidden * (1 if size["tie_word_embeddings"] else 2)
    return number["num_hidden_layers"] * layer + embeddings + hidden
