"""A tokenizer is what lies in its folder; a folder that is not one says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from unit.samples import DEBUG_TOKENIZER, SMOLLM2, open_tokenizer, write_tokenizer

from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

TEXT = "Where does Greta live?\n  Greta — naïve — lives\tnear the school. 日本 🙂 <|im_end|>\n"


def test_folder_without_tokenizer_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json.*model\.tokenizer_path"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has tokenizer\.model, which is not read yet"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_broken_tokenizer_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut off", "list", "not UTF-8", "deep"])
def test_broken_companion_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": 3})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"template": "x"}]})),
        ("tokenizer_config.json", json.dumps({"chat_template": ["x"]})),
        ("generation_config.json", json.dumps({"eos_token_id": "</s>"})),
        ("generation_config.json", json.dumps({"eos_token_id": [[1]]})),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_companion_of_the_wrong_types_is_refused_by_name(tmp_path: Path, name: str, content: str | bytes) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=name):
        Tokenizer(tmp_path)


def load_real(folder: Path) -> tuple[Tokenizer, Any]:
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; tests/assets/make_smollm2.py makes it")
    return Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("folder", [DEBUG_TOKENIZER, SMOLLM2], ids=["debug", "SmolLM2"])
def test_ids_and_text_are_those_of_transformers(folder: Path) -> None:
    ours, reference = load_real(folder)
    assert ours.encode(TEXT, add_special_tokens=False).ids == reference(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, add_special_tokens=True).ids == reference(TEXT)["input_ids"]
    ids = reference(TEXT)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(reference)
    assert ours.special_ids == {name: getattr(reference, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_special_tokens_may_be_objects_and_the_tokenizer_config_wins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>", "</s>", "<e>"], bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", add_bos_token=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "pad_token": {"content": "<e>"}}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<e>"}
    assert tokenizer.special_ids == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize(("listed", "expected"), [(None, {1}), (2, {1, 2}), ([0, 2], {0, 1, 2})])
def test_answers_stop_at_eos_and_at_what_the_generation_config_adds(tmp_path: Path, listed: Any, expected: set[int]) -> None:
    write_tokenizer(tmp_path, ["<s>", "</s>", "<e>"], eos_token="</s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert Tokenizer(tmp_path).stop_ids == expected


def test_document_ends_with_one_eos(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, ["<s>", "</s>"], eos_token="</s>")
    assert tokenizer.encode_document("ab")[-1] == 1
    assert len(tokenizer.encode_document("ab")) == 3
    assert len(tokenizer.encode_document("ab</s>")) == 3


def test_saved_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert len(Tokenizer(tmp_path).encode("abcd", add_special_tokens=False).ids) == 4


def test_template_of_its_own_file_wins_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>"], template="from the config")
    assert Tokenizer(tmp_path).chat_template == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(tmp_path).chat_template == "from the file"


def test_default_is_taken_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer(tmp_path, ["<s>"], chat_template=several)
    assert Tokenizer(tmp_path).chat_template == "plain"


def test_digest_follows_what_decides_the_ids_and_not_where_it_lies(tmp_path: Path) -> None:
    one, same, other = (write_tokenizer(tmp_path / name, ["<s>"] if name != "other" else ["<t>"]) for name in ("one", "same", "other"))
    assert Tokenizer(one).digest == Tokenizer(same).digest != Tokenizer(other).digest
