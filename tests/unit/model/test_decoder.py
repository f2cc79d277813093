"""A model is built on paper under Hugging Face's names; each weight is drawn from (seed, name) alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from unit.samples import TINY_FIELDS, tiny_config, tiny_model

from tunelib.adapters import add_adapters
from tunelib.batch import IGNORED
from tunelib.config.schema import Lora
from tunelib.model import decoder
from tunelib.model.decoder import FASTER_TURNED, build_on_meta, draw_weight

SHAPE = torch.Size((48, 32))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}], ids=str)
def test_parameters_have_the_names_and_shapes_of_transformers(changes: dict) -> None:
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**(TINY_FIELDS | changes)))
    ours = build_on_meta(tiny_config(**changes), torch.float32)
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == {
        name: parameter.shape for name, parameter in reference.named_parameters()
    }


def test_model_on_paper_has_no_storage_and_the_type_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = build_on_meta(tiny_config(), dtype)
        assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", dtype)}
        assert list(model.buffers()) == []


def test_tied_head_is_the_embedding_after_storage_is_given() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("labelled", [[], [2], [3, 4, 11, 17]], ids=str)
@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}], ids=str)
def test_last_layer_ends_at_labelled_positions_alone_with_the_numbers_of_all(
    changes: dict, labelled: list[int], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**changes)
    if rank:
        add_adapters(model, Lora(enable=True, rank=rank))
        model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    tokens = torch.randint(model.config.vocab_size, (2, 10), generator=generator)
    positions, lengths = torch.cat([torch.arange(6), torch.arange(4), torch.arange(10)]).view(2, 10), (6, 4, 10)
    labels = torch.full((20,), IGNORED)
    labels[labelled] = torch.randint(model.config.vocab_size, (len(labelled),), generator=generator)
    seen: list[torch.Size] = []
    *_, last = model.model.layers.values()
    last.mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1]))
    found = []
    for few in (0.8, -1):
        monkeypatch.setattr(decoder, "FEW", few)
        loss = model(tokens, positions, lengths, labels=labels.view(2, 10))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        found.append((loss, gradients, model(tokens, positions, lengths, labels=labels.view(2, 10), score=True)))
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert seen == [(len(labelled),)] * 2 + [(2, 10)] * 2


def test_drawn_weight_is_a_pure_function_of_seed_and_name() -> None:
    config = tiny_config()
    first = draw_weight(config, "model.layers.0.mlp.up_proj.weight", SHAPE, seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(draw_weight(config, "model.layers.0.mlp.up_proj.weight", SHAPE, seed=3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_weights_differ_across_names_and_seeds() -> None:
    config = tiny_config()
    names = [name for name, parameter in build_on_meta(config, torch.float32).named_parameters() if parameter.ndim == 2]
    drawn = [draw_weight(config, name, SHAPE, seed) for name in names for seed in (0, 1, 2**40, 2**63 - 1)]
    assert len({tuple(weight.flatten().tolist()) for weight in drawn}) == len(drawn)


def test_drawn_weight_does_not_depend_on_the_rest_of_the_model() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    deeper = tiny_config(num_hidden_layers=9, vocab_size=64)
    assert torch.equal(draw_weight(tiny_config(), name, SHAPE, 0), draw_weight(deeper, name, SHAPE, 0))


def test_drawn_weights_have_the_spread_that_the_config_says() -> None:
    config = tiny_config(initializer_range=0.05, num_hidden_layers=8)
    large = torch.Size((400, 400))
    for name, expected in {
        "model.embed_tokens.weight": 0.05,
        "lm_head.weight": 0.05,
        "model.layers.3.mlp.gate_proj.weight": 0.05,
        "model.layers.3.mlp.down_proj.weight": 0.05 / 4,
        "model.layers.3.self_attn.o_proj.weight": 0.05 / 4,
    }.items():
        weight = draw_weight(config, name, large, 0)
        assert weight.dtype == torch.float32
        assert weight.std().item() == pytest.approx(expected, rel=0.02)  # 160,000 draws: the deviation is known to 0.2 %
        assert abs(weight.mean().item()) < 0.02 * expected
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"):
        assert (draw_weight(config, name, torch.Size((8,)), 0) == 1).all()
    assert (draw_weight(config, "model.layers.0.self_attn.q_proj.bias", torch.Size((8,)), 0) == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 8, FASTER_TURNED, FASTER_TURNED + 1])
def test_logits_of_few_rows_are_those_of_the_head(rows: int) -> None:
    model = tiny_model(torch.float32)
    hidden = torch.randn(rows, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits_of(hidden), model.lm_head(hidden), rtol=1e-5, atol=1e-6)
