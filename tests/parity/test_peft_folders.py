"""Adapter folders that PEFT makes in other ways: read right, or refused by name; nothing of one is passed over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import peft
import pytest
import torch
import transformers
from conftest import TOKENIZER, Run, write_chats
from parity.test_peft import draw_tokens, write_lora_toml
from safetensors.torch import load_file, save_file

from tunelib.errors import FormatError
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.merge import plan_merge
from tunelib.formats.source import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning:transformers")


def make_adapter(base: Path, target: Path, **settings: Any) -> Any:
    """A PEFT model whose trained numbers are moved, saved to a folder."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings))
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(target)
    return model


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(draw_tokens(5)).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    foreign.make_hf(tmp_path / "base", tokenizer=TOKENIZER)
    return tmp_path / "base"


READ: dict[str, dict[str, Any]] = {
    "plain": {},
    "another alpha, rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "DoRA": {"use_dora": True},
    "modules by a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "head and embedding in full": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms in full": {"modules_to_save": ["input_layernorm"]},
    "a gaussian beginning": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", READ)
def test_merged_adapter_computes_what_peft_does(tmp_path: Path, base: Path, name: str) -> None:
    model = make_adapter(base, tmp_path / "adapter", **READ[name])
    with torch.no_grad():
        expected = model.eval()(draw_tokens(5)).logits
    assert (expected - logits_of(base)).abs().max() > 0.01
    convert(plan_merge(base, tmp_path / "adapter", tmp_path / "merged"))
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, rtol=0, atol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"lora_bias": True}, "lora_bias = true is not read here"),
    "an adapted embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A is not read here"),
    "an adapted head": ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\.base_layer\.weight is not read here"),
    "some tokens alone": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = .* is not read here"),
    "PiSSA, which changes the base": ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" is not read here'),
    "ranks by module": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .* is not read here"),
    "trained biases of the base": ({"bias": "lora_only"}, 'bias = "lora_only" is not read here'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_of_another_kind_is_refused_by_name(tmp_path: Path, base: Path, name: str) -> None:
    settings, words = REFUSED[name]
    make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(FormatError, match=words):
        plan_merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | values).items() if value != "absent"}
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no rank": (lambda folder: edit_config(folder, r="absent"), "r = None is not a whole number from 1 up"),
    "rank 0": (lambda folder: edit_config(folder, r=0), "r = 0 is not a whole number from 1 up"),
    "rank as text": (lambda folder: edit_config(folder, r="4"), "r = '4' is not a whole number"),
    "another rank": (lambda folder: edit_config(folder, r=8), "which are not of rank 8"),
    "alpha as text": (lambda folder: edit_config(folder, lora_alpha="8"), "lora_alpha = '8' is not a number"),
    "DoRA without lengths": (lambda folder: edit_config(folder, use_dora=True), "lora_magnitude_vector is missing"),
    "another method": (lambda folder: edit_config(folder, peft_type="IA3"), "peft_type = 'IA3'; LORA is read"),
    "no A": (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(Q_A)), "lora_A.weight is missing"),
    "A of one dimension": (lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q_A: torch.zeros(4)})), "which are not of rank 4"),
    "no finite numbers": (lambda folder: edit_tensors(folder, lambda tensors: tensors[Q_A].fill_(torch.nan)), "numbers that are not finite"),
    "a name of another's": (lambda folder: edit_tensors(folder, lambda tensors: tensors.update(x=torch.zeros(4))), "x is not a name of PEFT's"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors does not exist"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config\.json does not exist: is .* an adapter folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter_is_refused_by_name(tmp_path: Path, base: Path, name: str) -> None:
    make_adapter(base, tmp_path / "adapter")
    change, words = BROKEN[name]
    change(tmp_path / "adapter")
    with pytest.raises(FormatError, match=words):
        plan_merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_older_weights_file_is_read(tmp_path: Path, base: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter/adapter_model.safetensors"), tmp_path / "adapter/adapter_model.bin")
    convert(plan_merge(base, tmp_path / "adapter", tmp_path / "new"))
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    convert(plan_merge(base, tmp_path / "adapter", tmp_path / "old"))
    assert torch.equal(logits_of(tmp_path / "new"), logits_of(tmp_path / "old"))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_head_or_embedding_trained_apart_beside_a_tied_base_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    foreign.make_hf(tmp_path / "tied", tied=True)
    make_adapter(tmp_path / "tied", tmp_path / "adapter", **settings)
    with pytest.raises(FormatError, match="trains head and embedding apart, which are one weight"):
        plan_merge(tmp_path / "tied", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("which", ["train_lm_head = true", "train_embeddings = true", "train_lm_head = true\ntrain_embeddings = true"])
def test_trained_tied_head_opens_in_peft_starts_a_run_and_merges_in_every_form(tmp_path: Path, train: Callable[..., Run], which: str) -> None:
    foreign.make_hf(tmp_path / "base", tied=True, tokenizer=TOKENIZER)
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    run = train(write_lora_toml(tmp_path / "run.toml", tmp_path / "base", chats, which))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, run.folder / "adapter")(draw_tokens(5)).logits
    expected = logits_of(run.folder / "export")
    assert (expected - logits_of(tmp_path / "base")).abs().max() > 0.05
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    again = train(tmp_path / "run.toml", "--lora.adapter_path", str(run.folder / "adapter"), "--optimizer.lr", "1e-12")
    torch.testing.assert_close(logits_of(again.folder / "export"), expected, rtol=0, atol=1e-4)
    for kind in ("hf", "meta", "torch"):
        convert(plan_conversion(tmp_path / "base", tmp_path / kind, kind))
        convert(plan_merge(tmp_path / kind, run.folder / "adapter", tmp_path / f"merged-{kind}"))
        convert(plan_conversion(tmp_path / f"merged-{kind}", tmp_path / f"back-{kind}", "hf"))
        assert open_checkpoint(tmp_path / f"back-{kind}").config.tie_word_embeddings
        torch.testing.assert_close(logits_of(tmp_path / f"back-{kind}"), expected, rtol=0, atol=1e-4)
