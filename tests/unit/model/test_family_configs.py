"""Every family's config.json is understood as transformers does, or refused by the field that is not built."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CASES, SHAPE
from unit.samples import TINY_FIELDS

from tunelib.errors import FormatError
from tunelib.formats.meta import plan_meta
from tunelib.formats.source import expected_shapes
from tunelib.formats.tensors import TensorInfo
from tunelib.model.decoder import draw_weight
from tunelib.model.families import FAMILIES, hf_config, parse_config

OTHERS = [name for name in FAMILIES if name != "LlamaForCausalLM"]
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SLIDING, FULL = "sliding_attention", "full_attention"


def fields_of(architecture: str, **more: Any) -> dict[str, Any]:
    return {**TINY_FIELDS, "architectures": [architecture], **more}


def config_class(architecture: str) -> Any:
    return getattr(transformers, architecture.replace("ForCausalLM", "Config"))


@pytest.mark.parametrize(
    ("architecture", "more", "words"),
    [
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window = 0 is not a whole number from 1 up"),
        ("MistralForCausalLM", {"sliding_window": "4096"}, "sliding_window = '4096' is not a whole number"),
        ("MistralForCausalLM", {"layer_types": [FULL, SLIDING]}, "layer_types"),
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("MistralForCausalLM", {"num_local_experts": 8}, "num_local_experts"),
        ("Qwen2ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Qwen2ForCausalLM", {"layer_types": [FULL]}, r"layer_types = \['full_attention'\] are not 2 of full_attention and sliding_attention"),
        ("Qwen2ForCausalLM", {"layer_types": [FULL, "chunked_attention"]}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": [FULL, SLIDING]}, "layer_types names layers with a window, and sliding_window says none"),
        ("Qwen2ForCausalLM", {"layer_types": [FULL, ["x"]]}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": "sliding"}, "layer_types = 'sliding' is not a list"),
        ("Qwen2ForCausalLM", {"max_window_layers": -1}, "max_window_layers = -1 is not a whole number from 0 up"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ("Qwen3ForCausalLM", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes' is not true or false"),
        ("Qwen3ForCausalLM", {"num_experts": 128}, "num_experts"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75 is not supported"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "longrope"),
        ("Phi3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Phi3ForCausalLM", {"resid_pdrop": 0.1}, "resid_pdrop"),
        ("Gemma2ForCausalLM", {"hidden_activation": "silu"}, "hidden_activation = 'silu' is not supported"),
        ("Gemma2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0 is not a number above 0"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {"sliding_window": None, "layer_types": [SLIDING, FULL]}, "sliding_window says none"),
        ("Olmo2ForCausalLM", {"sliding_window": 8}, "sliding_window"),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_is_not_built_is_named(architecture: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=f"^here.*{words}"):
        parse_config(fields_of(architecture, **more), "here")


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize(("field", "value"), [("logit_scale", 0.25), ("quantization_config", {"quant_method": "gptq"}), ("attention_dropout", 0.1)])
def test_field_that_no_family_knows_is_named(architecture: str, field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"here.*{field}.*{architecture}"):
        parse_config(fields_of(architecture, **{field: value}), "here")


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({}, ()),
        ({"sliding_window": 16}, ()),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (0, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, (16, 16)),
        ({"use_sliding_window": True, "sliding_window": 16}, ()),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": [SLIDING, FULL]}, (16, 0)),
        ({"use_sliding_window": False, "sliding_window": 16, "layer_types": [FULL, FULL]}, ()),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwens_windows_are_those_of_transformers(architecture: str, more: dict[str, Any], windows: tuple[int, ...]) -> None:
    fields = fields_of(architecture, **more)
    assert parse_config(fields, "here").windows == windows
    reference = config_class(architecture)(**fields)
    theirs = [reference.sliding_window if kind == SLIDING else 0 for kind in reference.layer_types]
    assert tuple(theirs) == (windows or (0, 0))


@pytest.mark.parametrize("architecture", OTHERS)
def test_unset_fields_are_what_transformers_takes_them_for(architecture: str) -> None:
    heads = {"num_attention_heads": 32, "hidden_size": 1024}  # which Qwen's unset heads of keys and values divide
    given = {**{name: TINY_FIELDS[name] for name in REQUIRED}, **heads}
    ours, reference = parse_config({"architectures": [architecture], **given}, "here"), config_class(architecture)(**given)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.head_dim == (getattr(reference, "head_dim", None) or 32)
    assert ours.rope_theta == reference.rope_parameters["rope_theta"]
    assert max(ours.windows, default=None) == (None if "Qwen" in architecture else getattr(reference, "sliding_window", None))
    assert (ours.attention_softcap or None, ours.final_softcap or None) == tuple(
        getattr(reference, f"{kind}_logit_softcapping", None) for kind in ("attn", "final")
    )


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_way_to_a_config_json_and_through_transformers(tmp_path: Path, case: str) -> None:
    family, more = CASES[case]
    architecture = f"{family}ForCausalLM"
    reference = config_class(architecture)(**SHAPE, **{name: value for name, value in more.items() if name not in SHAPE})
    config = parse_config({**reference.to_dict(), "architectures": [architecture]}, "here")
    assert parse_config(json.loads(json.dumps(hf_config(config))), "here") == config
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    config_class(architecture).from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert parse_config(json.loads((tmp_path / "again/config.json").read_text()), "here") == config


def test_published_configs_of_an_older_time_are_read() -> None:
    """Fields as the first config.json of each family had them, of sizes made up."""
    gemma = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 32}
    config = parse_config(fields_of("Gemma2ForCausalLM", **gemma, sliding_window=32, attention_bias=False), "here")
    assert (config.windows, config.tie_word_embeddings, config.attention_scale) == ((32, 0), True, 256**-0.5)
    phi = {"auto_map": {"AutoConfig": "x.y"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 64, "sliding_window": 2047}
    assert parse_config(fields_of("Phi3ForCausalLM", **phi, rope_scaling=None, attention_bias=False), "here").windows == (2047, 2047)
    qwen = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "attention_dropout": 0.0}
    assert parse_config(fields_of("Qwen2ForCausalLM", **qwen), "here").attention_bias


@pytest.mark.parametrize("architecture", OTHERS)
def test_fresh_norms_multiply_with_one(architecture: str) -> None:
    config = parse_config(fields_of(architecture), "here")
    norms = [name for name in expected_shapes(config) if name.endswith("norm.weight")]
    assert len(norms) >= 2 * config.num_hidden_layers + 1
    for name in norms:
        drawn = draw_weight(config, name, torch.Size((8,)), 0)
        assert (drawn + config.norm_offset == 1).all(), name


@pytest.mark.parametrize("architecture", OTHERS)
def test_metas_form_refuses_other_families(architecture: str) -> None:
    config = parse_config(fields_of(architecture), "here")
    weights = {name: TensorInfo(name, torch.float32, tuple(shape)) for name, shape in expected_shapes(config).items()}
    with pytest.raises(FormatError, match=f"Meta's form has no names for {architecture}; take hf"):
        plan_meta(weights, config, 1)


def test_llama_departs_from_nothing() -> None:
    """What other families added has its plain value: Llama's layers do what they did."""
    config = parse_config(TINY_FIELDS, "here")
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING}
    assert {name: getattr(config, name) for name in defaults} == defaults
