"""A base model without chat tokens learns a chat template: tokens, rows and stop ids are added, on any number of processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, Run, run_processes, write_chats
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunelib.errors import DataError

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, train: Callable[..., Run]) -> Path:
    """A model trained for two steps on text, whose tokenizer has never heard of chats."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in CHAT_TOKENS]
    vocab = sorted((token for token in content["model"]["vocab"] if token not in CHAT_TOKENS), key=content["model"]["vocab"].get)
    kept = {token: number for number, token in enumerate(vocab)}
    content["model"]["vocab"] = kept
    for token in content["added_tokens"]:
        token["id"] = kept[token["content"]]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    eos = content["added_tokens"][0]["content"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"number {n} is written"}) + "\n" for n in range(60)))
    toml = tmp_path / "base.toml"
    toml.write_text(
        f"""
[model]
tokenizer_path = "{tokenizer}"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
vocab_size = {len(kept)}
tie_word_embeddings = {str(request.param == "tied").lower()}
[dataset]
path = "{tmp_path / "text.jsonl"}"
[training]
seq_len = 128
steps = 2
"""
    )
    return train(toml).folder / "export"


@pytest.fixture
def toml(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "chat.toml"
    path.write_text(
        f"""
[dataset]
path = "{write_chats(tmp_path / "chats.jsonl", 60)}"
chat_template = "chatml"
[training]
seq_len = 128
steps = 2
[checkpoint]
initial_load_path = "{base}"
"""
    )
    return path


def test_missing_tokens_are_an_error_with_the_ways_out(toml: Path, train: Callable[..., Run]) -> None:
    with pytest.raises(DataError) as error:
        train(toml)
    assert "writes <|im_start|>, <|im_end|>, which are no tokens of the tokenizer" in str(error.value)
    assert "dataset.chat_template" in str(error.value)
    assert "model.resize_embeddings = true" in str(error.value)


def test_tokens_and_rows_are_added_and_leave_with_the_model(toml: Path, base: Path, train: Callable[..., Run], tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    old_rows = len(before[EMBEDDING])
    run = train(toml, "--model.resize_embeddings", "--optimizer.lr", "1e-12", "--optimizer.weight_decay", "0")
    after = run.weights()
    for name in {EMBEDDING, HEAD} & before.keys():
        torch.testing.assert_close(after[name][:old_rows], before[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(after[name][old_rows:], before[name].mean(dim=0).expand(2, -1), rtol=0, atol=1e-6)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.folder / "export"), AutoTokenizer.from_pretrained(run.folder / "export")
    assert model.config.vocab_size == old_rows + 2
    assert tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS)) == [old_rows, old_rows + 1]
    stops = GenerationConfig.from_pretrained(run.folder / "export").eos_token_id
    assert old_rows + 1 in stops
    assert tokenizer.eos_token_id in stops
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], return_dict=False)
    assert ids[0] == old_rows
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    # What was exported goes on without any setting: nothing is missing any more.
    again = train(toml, "--checkpoint.initial_load_path", str(run.folder / "export"), folder=tmp_path / "again")
    assert again.weights()[EMBEDDING].shape == after[EMBEDDING].shape


def test_two_processes_add_the_same_rows(toml: Path, train: Callable[..., Run], tmp_path: Path) -> None:
    words = ["--model.resize_embeddings", "--training.dtype", "float64"]
    one = train(toml, *words)
    run_processes([[str(toml), "--job.dump_folder", str(tmp_path / "two"), *words]], world_size=2)
    two = Run(tmp_path / "two")
    assert two.series("loss") == pytest.approx(one.series("loss"), rel=1e-9)
    for name, weight in one.weights().items():
        torch.testing.assert_close(two.weights()[name], weight, rtol=1e-6, atol=1e-9)


def test_weights_of_a_step_folder_grow_too(toml: Path, base: Path, train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(tmp_path / "base.toml", "--checkpoint.enable_checkpoint", folder=tmp_path / "saved")
    words = ["--model.resize_embeddings", "--model.tokenizer_path", str(tmp_path / "tokenizer")]
    grown = train(toml, *words, "--checkpoint.initial_load_path", str(run.folder / "checkpoint/step-2"))
    plain = train(toml, *words)
    assert grown.series("loss") == plain.series("loss")
