"""A config.json is understood in full or refused by the field that is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from unit.samples import SMOLLM2, TINY_FIELDS, tiny_config

from tunelib.config.sizes import ARCHITECTURES, SIZES
from tunelib.errors import FormatError
from tunelib.model.config import RopeScaling
from tunelib.model.families import FAMILIES, hf_config, parse_config

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_config_check_and_families_know_the_same_architectures() -> None:
    assert tuple(FAMILIES) == ARCHITECTURES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", 4096),
        ("attention_dropout", 0.1),
        ("quantization_config", {"quant_method": "gptq"}),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("logit_scale", 0.25),
        ("num_experts", 8),
        ("use_qk_norm", True),
        ("attention_sink", True),
        ("residual_multiplier", 2),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_field_that_asks_for_what_is_not_built_is_named(field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"here.*{field}"):
        parse_config({**TINY_FIELDS, field: value}, "here")


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}], ids=str
)
@pytest.mark.parametrize("era", ["rope_scaling", "rope_parameters"])
def test_rope_of_another_type_is_named(scaling: dict[str, Any], era: str) -> None:
    with pytest.raises(FormatError, match=r"here.*rope_\w+.*(linear|dynamic|yarn)"):
        parse_config({**TINY_FIELDS, era: scaling}, "here")


@pytest.mark.parametrize("field", LLAMA_3_1)
@pytest.mark.parametrize("era", ["rope_scaling", "rope_parameters"])
def test_scaling_that_lacks_a_number_says_which(field: str, era: str) -> None:
    with pytest.raises(FormatError, match=f"lacks {field}"):
        parse_config({**TINY_FIELDS, era: {"rope_type": "llama3", **{name: value for name, value in LLAMA_3_1.items() if name != field}}}, "here")


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(FormatError, match=f"here lacks {field}"):
        parse_config({name: value for name, value in TINY_FIELDS.items() if name != field}, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_hidden_layers", 2.5),
        ("vocab_size", [48]),
        ("num_key_value_heads", "2"),
        ("head_dim", 7),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", "big"),
        ("rope_theta", 10**400),
        ("max_position_embeddings", 2**70),
        ("rope_scaling", "llama3"),
        ("rope_parameters", [1]),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_value_that_cannot_be_is_named(field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"here.*{field}"):
        parse_config({**TINY_FIELDS, field: value}, "here")


@pytest.mark.parametrize("theta", ["big", [1], 10**400, None, 0])
def test_theta_in_a_table_that_cannot_be_is_named(theta: Any) -> None:
    with pytest.raises(FormatError, match=r"here.*rope_theta"):
        parse_config({**TINY_FIELDS, "rope_parameters": {"rope_theta": theta}}, "here")


def test_heads_that_cannot_share_keys_are_an_error() -> None:
    with pytest.raises(FormatError, match=r"num_attention_heads = 4.*num_key_value_heads = 3"):
        parse_config({**TINY_FIELDS, "num_key_value_heads": 3}, "here")


@pytest.mark.parametrize("architectures", [None, [], ["GPT2LMHeadModel"], "LlamaForCausalLM", ["LlamaForCausalLM", "X"], [["LlamaForCausalLM"]]])
def test_other_architecture_is_refused_with_those_built(architectures: Any) -> None:
    with pytest.raises(FormatError, match=r"here.*architectures.*LlamaForCausalLM"):
        parse_config({**TINY_FIELDS, "architectures": architectures}, "here")


def test_rotary_fields_of_both_eras_of_transformers_are_read() -> None:
    old = parse_config({**TINY_FIELDS, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3_1}}, "here")
    new = parse_config({**TINY_FIELDS, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3_1}}, "here")
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling(**LLAMA_3_1))  # type: ignore[arg-type]  # one dict of floats and an int
    plain_old = parse_config({**TINY_FIELDS, "rope_theta": 2e4, "rope_scaling": None}, "here")
    plain_new = parse_config({**TINY_FIELDS, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "here")
    assert plain_old == plain_new
    assert (plain_new.rope_theta, plain_new.rope_scaling) == (2e4, None)


def test_theta_and_scaling_of_different_eras_are_read_together() -> None:
    mixed = parse_config({**TINY_FIELDS, "rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA_3_1}}, "here")
    assert mixed.rope_theta == 5e5
    reference = LlamaConfig(**TINY_FIELDS, rope_theta=5e5, rope_parameters={"rope_type": "llama3", **LLAMA_3_1})
    assert reference.rope_parameters["rope_theta"] == 5e5


def test_scaling_beside_default_parameters_is_not_ignored() -> None:
    both = {**TINY_FIELDS, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": {"rope_type": "llama3", **LLAMA_3_1}}
    with pytest.raises(FormatError, match=r"rope_parameters.*rope_scaling|rope_scaling.*rope_parameters"):  # transformers takes rope_scaling
        parse_config(both, "here")


def test_partial_rotation_is_refused_where_transformers_5_keeps_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(FormatError, match="partial_rotary_factor"):
        parse_config({**TINY_FIELDS, "rope_parameters": rope}, "here")


def test_unset_fields_are_what_transformers_takes_them_for() -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "architectures")
    ours, reference = (
        parse_config({name: TINY_FIELDS[name] for name in required}, "here"),
        LlamaConfig(**{name: TINY_FIELDS[name] for name in required}),
    )
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.initializer_range == reference.initializer_range
    assert ours.rope_theta == reference.rope_parameters["rope_theta"]


VARIANTS = {
    "plain": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
    "scaled": tiny_config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA_3_1}),
    "biased": tiny_config(attention_bias=True, mlp_bias=True),
    "wide heads": tiny_config(head_dim=16),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_config_survives_the_way_to_a_config_json_and_back(config: Any) -> None:
    assert parse_config(json.loads(json.dumps(hf_config(config))), "here") == config


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_understands_our_config_json_as_we_do(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert parse_config(json.loads((tmp_path / "again/config.json").read_text()), "here") == config


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_are_configs(name: str) -> None:
    config = parse_config({"architectures": ["LlamaForCausalLM"], **SIZES[name]}, name)
    assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_real_config_is_read() -> None:
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is not there; tests/assets/make_smollm2.py makes it")
    config = parse_config(json.loads((SMOLLM2 / "config.json").read_text()), "here")
    named = parse_config({"architectures": ["LlamaForCausalLM"], **SIZES["smollm2-135m"]}, "here")
    assert config == named
