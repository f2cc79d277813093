"""Adapters change a model in place: what is frozen, what is drawn, and what merging gives."""

import pytest
import torch
from unit.samples import TINY_FIELDS

from tunelib.adapters import AdaptedLinear, add_adapters, draw_adapter, merge
from tunelib.config.schema import Lora
from tunelib.errors import ConfigError
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.model.families import parse_config


def adapted(**settings: object) -> Decoder:
    model = build_on_meta(parse_config(TINY_FIELDS, "tiny"), torch.float32)
    add_adapters(model, Lora(enable=True, rank=4, **settings))  # type: ignore[arg-type]
    return model


def test_only_adapters_are_trained_and_the_base_keeps_its_names() -> None:
    base = dict(build_on_meta(parse_config(TINY_FIELDS, "tiny"), torch.float32).named_parameters())
    model = adapted()
    frozen = {name: parameter.shape for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name: parameter.shape for name, parameter in base.items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("which", ["train_lm_head", "train_embeddings"])
def test_head_and_embedding_are_trained_where_that_is_asked_for(which: str) -> None:
    names = {"train_lm_head": "lm_head.weight", "train_embeddings": "model.embed_tokens.weight"}
    model = adapted(**{which: True})
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name] == [names[which]]


def test_named_modules_get_an_adapter_and_no_others() -> None:
    model = adapted(target_modules=("q_proj", "down_proj"))
    assert {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, AdaptedLinear)} == {"q_proj", "down_proj"}
    with pytest.raises(ConfigError, match=r"'lm_head' gets no adapter; lora.train_lm_head trains it in full"):
        adapted(target_modules=("lm_head",))


def test_fresh_matrices_follow_from_seed_and_name() -> None:
    shape = torch.Size((4, 64))
    a = draw_adapter("x.lora_A.weight", shape, 0)
    assert torch.equal(a, draw_adapter("x.lora_A.weight", shape, 0))
    assert not torch.equal(a, draw_adapter("y.lora_A.weight", shape, 0))
    assert not torch.equal(a, draw_adapter("x.lora_A.weight", shape, 1))
    assert 0.11 < a.abs().max() <= 1 / 8
    assert not draw_adapter("x.lora_B.weight", torch.Size((64, 4)), 0).any()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weight_computes_what_the_layer_does_and_rows_merge_by_themselves(use_dora: bool, use_rslora: bool) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(8, 6, True, Lora(enable=True, rank=2, alpha=3.0, use_dora=use_dora, use_rslora=use_rslora))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    magnitude = layer.lora_magnitude_vector
    merged = merge(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, magnitude)
    x = torch.randn(5, 8)
    torch.testing.assert_close(x @ merged.T + layer.bias, layer(x))
    part = merge(layer.weight[2:5], layer.lora_A.weight, layer.lora_B.weight[2:5], layer.scaling, None if magnitude is None else magnitude[2:5])
    torch.testing.assert_close(part, merged[2:5])


def test_row_of_zeros_gives_finite_numbers() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(8, 6, False, Lora(enable=True, rank=2, use_dora=True))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert layer.lora_magnitude_vector is not None
    with torch.no_grad():
        layer.weight[3] = 0
        layer.lora_magnitude_vector[3] = 0
        for lora_b in (torch.zeros(6, 2), torch.randn(6, 2)):
            layer.lora_B.weight.copy_(lora_b)
            x = torch.randn(5, 8)
            merged = merge(layer.weight, layer.lora_A.weight, lora_b, layer.scaling, layer.lora_magnitude_vector)
            assert layer(x).isfinite().all()
            torch.testing.assert_close(x @ merged.T, layer(x))
