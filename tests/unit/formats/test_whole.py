"""Any checkpoint as a model to use, and its building blocks as a user would take them."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from unit.samples import DEBUG_TOKENIZER, tiny_model, write_model

from tunelib.errors import FormatError
from tunelib.formats import load_model
from tunelib.formats.convert import convert, plan_conversion

TOKENS = torch.tensor([[5, 9, 33, 7, 2, 40]])


def logits_of(path: Path, **words: object) -> torch.Tensor:
    model = load_model(path, **words).model
    return model(TOKENS, torch.arange(6)[None], (6,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", tiny_model(torch.float32), DEBUG_TOKENIZER)


@pytest.mark.parametrize("kind", ["hf", "meta", "dcp", "torch"])
def test_every_form_gives_the_same_model(folder: Path, tmp_path: Path, kind: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    if kind != "hf":
        convert(plan_conversion(folder, tmp_path / kind, kind))
    torch.testing.assert_close(logits_of(folder if kind == "hf" else tmp_path / kind), expected, rtol=1e-5, atol=1e-5)


def test_words_come_along(folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.tokenizer is not None
    assert loaded.template is not None
    assert loaded.stop_ids >= loaded.tokenizer.stop_ids
    assert load_model(folder, chat_template="none").template is None
    (folder / "tokenizer.json").unlink()
    assert load_model(folder).tokenizer is None
    assert load_model(folder, tokenizer_path=DEBUG_TOKENIZER).tokenizer is not None


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_is_merged_and_finds_its_base(folder: Path, tmp_path: Path, use_dora: bool) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=use_dora, init_lora_weights="gaussian")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(TOKENS).logits
    assert (expected - logits_of(folder)).abs().max() > 0.01
    torch.testing.assert_close(logits_of(folder, adapter=tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-4)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/base"}))
    with pytest.raises(FormatError, match="of a base called 'some/base', which is not here"):
        load_model(tmp_path / "adapter")


def test_types(folder: Path) -> None:
    assert load_model(folder, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16
    assert load_model(folder).model.lm_head.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in load_model(folder).model.parameters())


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_model(folder)
