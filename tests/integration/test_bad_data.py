"""Whatever is wrong with data is one sentence with its file and line: tests/golden/bad_data.txt, for people to read.

UPDATE_GOLDEN=1 writes the file anew.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TOKENIZER

from tunelib.config.schema import Columns, Dataset
from tunelib.data.prepare import HeldOut, build_documents, find_words
from tunelib.errors import DataError

GOLDEN = ROOT / "tests/golden/bad_data.txt"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, ANSWER]}
Case = tuple[Callable[[], object], dict[str, Any]]


def lines(*rows: Any, name: str = "data.jsonl", then: str = "") -> Callable[[], object]:
    return lambda: Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows) + then)


def raw(content: bytes, name: str = "data.jsonl") -> Callable[[], object]:
    return lambda: Path(name).write_bytes(content)


def loop() -> None:
    Path("folder").mkdir()
    Path("folder/again").symlink_to(Path("folder").absolute())
    Path("folder/data.jsonl").write_text("{}")


CASES: dict[str, Case] = {
    "broken JSON": (lines(CHAT, then='{"messages": [\n'), {}),
    "not an object": (lines(CHAT, ["a"]), {}),
    "an array as JSON Lines": (raw(json.dumps([CHAT, CHAT], indent=1).encode()), {}),
    "unknown columns": (lines({"dialog": []}), {}),
    "two formats at once": (lines({**CHAT, "text": "a"}), {}),
    "wrong column": (lines(CHAT), {"columns": Columns(messages="talk")}),
    "a column that is not there": (lines(CHAT), {"columns": Columns(system="sys")}),
    "columns of another format": (lines(CHAT), {"columns": Columns(text="body")}),
    "mixed shapes": (lines(CHAT, CHAT, {"text": "a"}), {}),
    "system prompt in the middle": (lines({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}), {}),
    "two users in a row, Llama 2": (lines(CHAT, {"messages": [USER, USER, ANSWER]}), {"chat_template": "llama2"}),
    "no answer": (lines(CHAT, {"messages": [USER]}), {}),
    "unknown role": (lines({"messages": [{"role": "bot", "content": "a"}, ANSWER]}), {}),
    "content that is no text": (lines({"messages": [USER, {"role": "assistant", "content": 5}]}), {}),
    "a weight that is no number": (lines({"messages": [USER, {**ANSWER, "weight": float("nan")}]}), {}),
    "a user who is trained": (lines({"messages": [{**USER, "train": True}, ANSWER]}), {}),
    "labels that are shifted": (lines({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}), {}),
    "half a character": (raw(b'{"text": "\\ud83d"}\n'), {}),
    "empty file": (raw(b""), {}),
    "only blank lines": (raw(b"\n\n"), {}),
    "not UTF-8": (raw('{"text": "schön"}\n'.encode("latin-1")), {}),
    "a line of 100 MB": (raw(b'{"text": "a"}\n{"text": "' + b"a" * 100_000_000 + b'"}\n'), {}),
    "an unknown kind": (raw(b"x", "data.docx"), {"path": "data.docx"}),
    "a folder without data": (lambda: Path("folder").mkdir(), {"path": "folder"}),
    "a link that makes a circle": (loop, {"path": "folder"}),
    "no such file": (lines(CHAT), {"path": "dta.jsonl"}),
    "a Hub name as a path": (lines(CHAT), {"path": "owner/name"}),
    "a pattern without a match": (lines(CHAT), {"path": "*.parquet"}),
    "a row of a table with too many fields": (raw(b"text\na\nb,c\n", "data.csv"), {"path": "data.csv"}),
    "all too long": (lines({"text": "word " * 100}, {"text": "word " * 90}), {"too_long": "drop"}),
    "too long": (lines({"text": "word"}, {"text": "word " * 100}), {"too_long": "error"}),
    "an id outside of the vocabulary": (lines({"input_ids": [1, 2, 3]}, {"input_ids": [1, 2_000, 3]}), {}),
    "nothing trained": (lines({"input_ids": [1, 2, 3], "loss_mask": [1, 0, 0]}), {}),
    "unknown template": (lines(CHAT), {"chat_template": "chatlm"}),
    "a template that is no Jinja": (lambda: (lines(CHAT)(), Path("t.jinja").write_text("{% for %}")), {"chat_template": "t.jinja"}),
    "template tokens that are not in the vocabulary": (lines(CHAT), {"chat_template": "llama3"}),
    "a template for text": (lines({"text": "a"}), {"chat_template": "chatml"}),
}


def read_all(section: Dataset) -> None:
    words = find_words(section, TOKENIZER, resize_embeddings=False)
    build_documents(words, section, 32, words.tokenizer.vocab_size, HeldOut())


def problem_of(case: Case) -> str:
    make, settings = case
    make()
    section = Dataset(**{"path": "data.jsonl", "cache_folder": "cache", **settings})
    with pytest.raises(DataError) as caught:
        read_all(section)
    return str(caught.value).replace(str(Path.cwd()), ".").replace(str(TOKENIZER), "TOKENIZER")


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_said_in_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem = problem_of(CASES[name])
    golden = dict(block.split("\n", 1) for block in GOLDEN.read_text().removesuffix("\n").split("\n\n")) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        golden[f"# {name}"] = problem
        GOLDEN.write_text("\n\n".join(f"# {known}\n{golden[f'# {known}']}" for known in CASES if f"# {known}" in golden) + "\n")
    assert golden.get(f"# {name}") == problem
