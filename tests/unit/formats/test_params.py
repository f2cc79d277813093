"""Meta's params.json gives the fields of config.json, and back; what one of the two cannot say is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelib.config.sizes import PARAMS, SIZES
from tunelib.errors import FormatError
from tunelib.formats.params import PUBLISHED_SPLITS, WITHOUT_EFFECT, ffn_width, parse_params, plan_params
from tunelib.model.config import ModelConfig, RopeScaling
from tunelib.model.families import hf_config, parse_config

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 48, "multiple_of": 16, "norm_eps": 1e-5}
SCALING_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
WITHOUT_LOGIT = ("max_position_embeddings", "initializer_range")


def read(params: dict[str, Any], vocab_size: int = 48, tied: bool = False) -> ModelConfig:
    fields = parse_params(params, vocab_size, "params.json")
    assert "tie_word_embeddings" not in fields
    return parse_config({**fields, "tie_word_embeddings": tied}, "config.json")


def named_size(name: str) -> ModelConfig:
    return parse_config({"architectures": ["LlamaForCausalLM"], **SIZES[name]}, name)


@pytest.mark.parametrize("name", PARAMS)
def test_published_params_give_the_named_size(name: str) -> None:
    size = named_size(name)
    assert read(PARAMS[name], size.vocab_size, size.tie_word_embeddings) == size


@pytest.mark.parametrize("name", PARAMS)
def test_named_size_gives_the_published_params(name: str) -> None:
    assert plan_params(named_size(name)) == PARAMS[name]


def test_every_size_of_meta_has_its_params() -> None:
    assert PARAMS.keys() == {name for name in SIZES if name.startswith("llama")}


def test_fields_are_those_of_a_config_json() -> None:
    config = read(TINY)
    expected = hf_config(config)
    del expected["tie_word_embeddings"]
    assert parse_params(TINY, 48, "params.json") == expected


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.2-3b"])
def test_resized_vocabulary_keeps_the_published_scaling(name: str) -> None:
    size = replace(named_size(name), vocab_size=128264)
    params = plan_params(size)
    assert params == {**PARAMS[name], "vocab_size": 128264}
    assert read(params, 128264, tied=True) == size


def test_published_shape_may_have_another_vocabulary_and_epsilon() -> None:
    size = replace(named_size("llama2-7b"), vocab_size=32001, rms_norm_eps=1e-6)
    params = plan_params(size)
    assert params == {**PARAMS["llama2-7b"], "vocab_size": 32001, "norm_eps": 1e-6}
    assert read(params, 32001) == size


@pytest.mark.parametrize("change", [{"n_layers": 12}, {"n_heads": 16}, {"n_kv_heads": 4}, {"ffn_dim_multiplier": 1.0}, {"rope_theta": 1e6}])
def test_published_factor_needs_the_whole_shape(change: dict[str, Any]) -> None:
    assert read({**PARAMS["llama3.2-1b"], **change}, 128256).rope_scaling == SCALING_3_1


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (8192, 256, None, 22016),  # Llama 1's 65B
        (2048, 256, 1.5, 8192),
        (100, 1, 1.3, 345),  # int(8 · 100 / 3) = 266 first: int(1.3 · 266.67) would be 346
        (64, 32, 1.0, 192),
    ],
)
def test_ffn_width_is_rounded_as_meta_does(dim: int, multiple_of: int, multiplier: float | None, expected: int) -> None:
    assert ffn_width(dim, multiple_of, multiplier) == expected


def test_keys_left_out_have_metas_defaults() -> None:
    config = read({"dim": 64, "n_layers": 2, "n_heads": 4})
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (4, 16, 256)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling, config.max_position_embeddings) == (1e-5, 10000.0, None, 4096)
    nulls = dict.fromkeys(("n_kv_heads", "ffn_dim_multiplier", "multiple_of", "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size"))
    assert read({"dim": 64, "n_layers": 2, "n_heads": 4, **nulls}) == config


def test_context_and_scaling_of_shapes_that_were_not_published() -> None:
    llama3 = read({**TINY, "rope_theta": 500000.0})
    assert (llama3.max_position_embeddings, llama3.rope_scaling) == (8192, None)
    assert read({**TINY, "rope_theta": 500000.0, "use_scaled_rope": False}) == llama3
    scaled = read({**TINY, "rope_theta": 500000.0, "use_scaled_rope": True})
    assert (scaled.max_position_embeddings, scaled.rope_scaling) == (131072, SCALING_3_1)


@pytest.mark.parametrize("vocab_size", [-1, 48, None])
def test_vocabulary_is_that_of_the_weights(vocab_size: int | None) -> None:
    assert read({**TINY, "vocab_size": vocab_size}).vocab_size == 48


def test_keys_that_say_how_a_program_is_started_change_nothing() -> None:
    assert read({**TINY, **dict.fromkeys(WITHOUT_EFFECT, 7), "moe": None}) == read(TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "in/params.json lacks dim"),
        ({"n_layers": None, "n_heads": None}, "in/params.json lacks n_layers, n_heads"),
        ({"dim": "64"}, "in/params.json: dim = '64' is not a whole number from 1 up"),
        ({"dim": 64.0}, "in/params.json: dim = 64.0 is not a whole number from 1 up"),
        ({"n_layers": 0}, "in/params.json: n_layers = 0 is not a whole number from 1 up"),
        ({"n_heads": True}, "in/params.json: n_heads = True is not a whole number from 1 up"),
        ({"n_kv_heads": -1}, "in/params.json: n_kv_heads = -1 is not a whole number from 1 up"),
        ({"multiple_of": 0}, "in/params.json: multiple_of = 0 is not a whole number from 1 up"),
        ({"ffn_dim_multiplier": "1.3"}, "in/params.json: ffn_dim_multiplier = '1.3' is not a number above 0"),
        ({"ffn_dim_multiplier": 1e-3}, "in/params.json: ffn_dim_multiplier = 0.001 leaves no feed-forward for dim = 64"),
        ({"ffn_dim_multiplier": 1e308}, "in/params.json: ffn_dim_multiplier = 1e+308 leaves no feed-forward for dim = 64"),
        ({"norm_eps": 0.0}, "in/params.json: norm_eps = 0.0 is not a number above 0"),
        ({"norm_eps": float("nan")}, "in/params.json: norm_eps = nan is not a number above 0"),
        ({"rope_theta": float("inf")}, "in/params.json: rope_theta = inf is not a number above 0"),
        ({"rope_theta": [10000.0]}, "in/params.json: rope_theta = [10000.0] is not a number above 0"),
        ({"use_scaled_rope": 1}, "in/params.json: use_scaled_rope = 1 is not true or false"),
        ({"vocab_size": 0}, "in/params.json: vocab_size = 0 is not a whole number from 1 up"),
        ({"vocab_size": 50}, "in/params.json: vocab_size = 50, but the weights' tok_embeddings has 48 rows"),
        ({"dim": 66}, "in/params.json: dim = 66 is not a multiple of n_heads = 4"),
        ({"n_kv_heads": 3}, "in/params.json: n_heads = 4 is not a multiple of n_kv_heads = 3"),
        ({"dim": 60}, "in/params.json: dim / n_heads = 15 is odd; rotary positions turn pairs"),
        ({"moe": {"num_experts": 8}}, "in/params.json: moe = {'num_experts': 8} is not supported"),
        ({"quantization_args": {"group_size": 256}}, "in/params.json: quantization_args = {'group_size': 256} is not supported"),
        ({"lora_args": {"rank": 16}}, "in/params.json: lora_args = {'rank': 16} is not supported"),
        ({"vision_chunk_size": 560}, "in/params.json: vision_chunk_size = 560 is not supported"),
        ({"hidden_dim": 6400}, "in/params.json: hidden_dim = 6400 is not supported"),
        ({"sliding_window": 4096}, "in/params.json: sliding_window = 4096 is not supported"),
        ({"head_dim": 32}, "in/params.json: head_dim = 32 is not supported"),
        ({"another": False}, "in/params.json: another = False is not supported"),
    ],
)
def test_params_that_cannot_be_kept_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_params({**TINY, **changes}, 48, "in/params.json")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 32}, "params.json cannot say head_dim = 32: a reader takes hidden_size / num_attention_heads, here 64 / 4"),
        ({"hidden_size": 66}, "params.json cannot say head_dim = 16: a reader takes hidden_size / num_attention_heads, here 66 / 4"),
        ({"attention_bias": True}, "params.json cannot say attention_bias = True, which a reader would take for False"),
        ({"mlp_bias": True}, "params.json cannot say mlp_bias = True, which a reader would take for False"),
        ({"architecture": "Other"}, "params.json cannot say architecture = Other, which a reader would take for LlamaForCausalLM"),
        (
            {"max_position_embeddings": 64, "initializer_range": 0.1},
            "params.json cannot say max_position_embeddings = 64, which a reader would take for 4096; "
            "nor initializer_range = 0.1, which a reader would take for 0.02",
        ),
        (
            {"rope_scaling": replace(SCALING_3_1, factor=32.0), "max_position_embeddings": 131072},
            f"params.json cannot say rope_scaling = {replace(SCALING_3_1, factor=32.0)}, which a reader would take for {SCALING_3_1}",
        ),
        (
            {"intermediate_size": 2**60 + 1},
            f"params.json cannot say intermediate_size = {2**60 + 1} for hidden_size = 64: no ffn_dim_multiplier gives exactly that",
        ),
    ],
)
def test_models_that_params_cannot_say_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        plan_params(replace(read(TINY), **changes))
    assert str(caught.value) == message


def test_published_shape_refuses_another_factor() -> None:
    size = named_size("llama3.2-1b")
    with pytest.raises(FormatError, match=r"rope_scaling = RopeScaling\(factor=8\.0.* take for RopeScaling\(factor=32\.0"):
        plan_params(replace(size, rope_scaling=SCALING_3_1))
    with pytest.raises(FormatError, match=r"rope_scaling = RopeScaling\(factor=32\.0.* take for RopeScaling\(factor=8\.0"):
        plan_params(replace(named_size("llama3.1-8b"), rope_scaling=size.rope_scaling))


def test_what_may_change_is_not_refused() -> None:
    config = replace(read(TINY), max_position_embeddings=64, initializer_range=0.1)
    found = read(plan_params(config, may_change=WITHOUT_LOGIT))
    assert replace(found, max_position_embeddings=64, initializer_range=0.1) == config


@pytest.mark.parametrize(("multiple_of", "multiplier"), PUBLISHED_SPLITS)
def test_published_splits_come_first(multiple_of: int, multiplier: float | None) -> None:
    config = replace(read(TINY), hidden_size=1024, head_dim=256, intermediate_size=ffn_width(1024, multiple_of, multiplier))
    params = plan_params(config)
    assert (params["multiple_of"], params.get("ffn_dim_multiplier")) in PUBLISHED_SPLITS


@st.composite
def any_model(draw: st.DrawFn) -> ModelConfig:
    """Shapes of which most can be said; the rest differs in one of the ways that cannot."""
    kv_heads, group, half = (draw(st.integers(1, 8)) for _ in range(3))
    scaling = draw(st.sampled_from([None, None, SCALING_3_1, replace(SCALING_3_1, factor=32.0), replace(SCALING_3_1, low_freq_factor=2.0)]))
    theta = draw(st.sampled_from([10000.0, 500000.0]) | st.floats(1.5, 1e7))
    usual = 131072 if scaling else 4096 if theta == 10000.0 else 8192
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=2 * half * kv_heads * group,
        intermediate_size=draw(st.integers(1, 100_000)),
        num_hidden_layers=draw(st.integers(1, 200)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=2 * half + draw(st.sampled_from([0, 0, 0, 2])),
        max_position_embeddings=draw(st.sampled_from([usual, usual, 2048])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6]) | st.floats(1e-12, 0.1)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.sampled_from([False, False, False, True])),
        mlp_bias=draw(st.sampled_from([False, False, False, True])),
        initializer_range=draw(st.sampled_from([0.02, 0.02, 0.02, 0.1])),
    )


def can_be_said(config: ModelConfig) -> bool:
    usual = 131072 if config.rope_scaling else 4096 if config.rope_theta == 10000.0 else 8192
    return (
        config.head_dim * config.num_attention_heads == config.hidden_size
        and not config.attention_bias
        and not config.mlp_bias
        and config.rope_scaling in (None, SCALING_3_1)
        and config.max_position_embeddings == usual
        and config.initializer_range == 0.02
    )


@settings(max_examples=400, deadline=None)
@given(any_model())
def test_params_give_the_same_model_back_or_are_refused(config: ModelConfig) -> None:
    if can_be_said(config):
        assert read(plan_params(config), config.vocab_size, config.tie_word_embeddings) == config
    else:
        with pytest.raises(FormatError, match=r"params\.json cannot say"):
            plan_params(config)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 2**15), st.integers(1, 2**18))
def test_every_ffn_width_can_be_said(dim: int, width: int) -> None:
    config = replace(read(TINY), hidden_size=2 * dim, num_attention_heads=1, num_key_value_heads=1, head_dim=2 * dim, intermediate_size=width)
    assert read(plan_params(config)) == config
