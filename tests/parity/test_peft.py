"""Adapters compute what PEFT's do, train as they do, and go there and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TOKENIZER, Run, write_chats
from safetensors.torch import load_file

from tunelib.adapters import add_adapters
from tunelib.config.schema import Lora, Model
from tunelib.formats.load import find_weights, give_weights
from tunelib.model.decoder import Decoder, build_on_meta

KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
LENGTH = 40
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning", "ignore::FutureWarning:transformers")


def load_ours(folder: Path, section: Lora | None) -> Decoder:
    """The calls that train.py makes."""
    weights = find_weights(Model(), str(folder), 0, 0)
    model = build_on_meta(weights.config, torch.float32)
    if section is not None:
        add_adapters(model, section)
    model.to_empty(device="cpu")
    model.tie_weights()
    give_weights(model, weights, seed=0)
    return model


def load_theirs(folder: Path, **settings: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings))


def our_name(theirs: str) -> str:
    return theirs.removeprefix("base_model.model.").replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def draw_tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 96, (1, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def our_logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(tokens.shape[1])[None], (tokens.shape[1],))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"tied": True}, {"attention_bias": True, "mlp_bias": True, "hidden_size": 256}], ids=str)
def test_model_begins_as_its_base_bit_for_bit(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    foreign.make_hf(tmp_path, **more)
    adapted, base = load_ours(tmp_path, Lora(True, rank=4, alpha=8.0, **KINDS[kind])), load_ours(tmp_path, None)
    with torch.no_grad():
        assert torch.equal(our_logits(adapted, draw_tokens(0)), our_logits(base, draw_tokens(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    foreign.make_hf(tmp_path)
    ours, theirs = load_ours(tmp_path, Lora(True, rank=4, alpha=8.0, **KINDS[kind])), load_theirs(tmp_path, **KINDS[kind])
    own = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    other = {our_name(name): parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert own.keys() == other.keys()
    for name, parameter in other.items():
        if name.endswith("lora_magnitude_vector"):
            assert torch.equal(parameter, own[name])
        parameter.data.copy_(own[name].data)
    optimizers = [torch.optim.AdamW(parameters.values(), lr=1e-2) for parameters in (own, other)]
    for step in range(20):
        tokens = draw_tokens(step)
        losses = [F.cross_entropy(logits[0], tokens[0, 1:]) for logits in (our_logits(ours, tokens[:, :-1]), theirs(tokens[:, :-1]).logits)]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for name, parameter in own.items():
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-6)
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if name not in own)


def write_lora_toml(path: Path, base: Path, data: Path, lora: str) -> Path:
    path.write_text(
        f"""
[checkpoint]
initial_load_path = "{base}"
[dataset]
path = "{data}"
[training]
seq_len = 128
steps = 3
[optimizer]
lr = 1e-2  # large: a difference must show
[lora]
enable = true
rank = 4
alpha = 8
{lora}"""
    )
    return path


@pytest.mark.parametrize("lora", ["", "use_rslora = true", "use_dora = true", 'target_modules = ["q_proj", "down_proj"]', "train_lm_head = true"])
def test_our_adapter_opens_in_peft_and_the_merged_export_computes_the_same(tmp_path: Path, train: Callable[..., Run], lora: str) -> None:
    foreign.make_hf(tmp_path / "base", tokenizer=TOKENIZER)
    run = train(write_lora_toml(tmp_path / "run.toml", tmp_path / "base", write_chats(tmp_path / "chats.jsonl", 40), lora))
    tokens = draw_tokens(5)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, run.folder / "adapter")(tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)(tokens).logits
    assert (adapted - before).abs().max() > 0.05
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_made_by_peft_starts_a_run_here(tmp_path: Path, train: Callable[..., Run], kind: str) -> None:
    foreign.make_hf(tmp_path / "base", tokenizer=TOKENIZER)
    theirs = load_theirs(tmp_path / "base", **KINDS[kind])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    settings = "".join(f"{name} = true\n" for name in KINDS[kind]) + f'adapter_path = "{tmp_path / "adapter"}"\n'
    toml = write_lora_toml(tmp_path / "run.toml", tmp_path / "base", write_chats(tmp_path / "chats.jsonl", 40), settings)
    run = train(toml, "--optimizer.lr", "1e-12")  # as good as none, so that what leaves is what came
    with torch.no_grad():
        expected = theirs.eval()(draw_tokens(5)).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)(draw_tokens(5)).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    back = load_file(run.folder / "adapter/adapter_model.safetensors")
    given = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert back.keys() == given.keys()
    assert json.loads((run.folder / "adapter/adapter_config.json").read_text())["r"] == 4
