"""The shipped debug data and tokenizer are what their script makes, and what the debug configs say of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "train_configs" / "assets" / "debug"


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    lines = (SHIPPED / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def prompts_of(config: str) -> list[str]:
    return tomllib.loads((REPO / "train_configs" / config).read_text(encoding="utf-8"))["validation"]["prompts"]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_shipped_files_are_made_by_the_script_byte_for_byte(tmp_path, hash_seed):
    command = [sys.executable, str(REPO / "train_configs/assets/make_debug_assets.py"), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True, capture_output=True)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {path.relative_to(SHIPPED): path.read_bytes() for path in SHIPPED.rglob("*") if path.is_file()}
    assert made == shipped
    assert sum(map(len, shipped.values())) < 1_000_000


def test_conversations_are_turns_of_user_and_assistant_and_none_comes_twice(conversations):
    for messages in conversations:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in messages)
    assert len({json.dumps(messages) for messages in conversations}) == len(conversations) == 2000
    assert any(messages[0]["role"] == "system" for messages in conversations)
    assert any(len(messages) > 3 for messages in conversations)


@pytest.mark.parametrize("config", ["debug_model.toml", "smollm2_135m_full.toml"])
def test_prompts_of_the_configs_are_never_asked_in_the_data(conversations, config):
    asked = [message["content"] for messages in conversations for message in messages if message["role"] == "user"]
    for prompt in prompts_of(config):
        assert not [question for question in asked if prompt in question]


def test_each_question_has_one_answer(conversations):
    """So that a greedy answer is right or wrong."""
    answers = {}
    for messages in conversations:
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                assert answers.setdefault(json.dumps(messages[:number]), message["content"]) == message["content"]


def test_tokenizer_encodes_any_text_and_gives_it_back():
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() % 2 == 0
    for text in ("Nora's house is green.", "  two  spaces\n\ttab", "Ünïcödé 漢字 🙂", "<|im_start|>user\nHello!<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_opens_the_tokenizer_and_renders_the_template_identically(conversations):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED / "tokenizer")
    settings = json.loads((SHIPPED / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "generation %" not in settings["chat_template"]
    template = jinja2.Environment().from_string(settings["chat_template"])
    ours = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json"))
    assert len(tokenizer) == ours.get_vocab_size()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    for messages in conversations[:100]:
        for cue in (False, True):
            text = template.render(messages=messages, add_generation_prompt=cue)
            assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue) == text
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=cue, return_dict=False)
            assert ids == ours.encode(text).ids


def test_longest_conversation_fits_a_row_of_the_debug_config(conversations):
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer" / "tokenizer.json"))
    text = ["".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages) for messages in conversations]
    assert max(len(encoded.ids) for encoded in tokenizer.encode_batch(text)) == 70  # the number that debug_model.toml gives
