"""What is told before training: held-out documents that are trained on, tools that nobody sees, tokens that were added."""

import json
from pathlib import Path
from typing import Any

import pytest
from unit.samples import DEBUG_TOKENIZER

from tunelib.config.schema import Columns, Dataset, MixedSource
from tunelib.data.chat import CHATML
from tunelib.data.prepare import Documents, HeldOut, Words, build_documents, find_words
from tunelib.errors import DataError

TURN = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def chats(*answers: str, column: str = "messages") -> list[dict[str, Any]]:
    return [{column: [TURN[0], {"role": "assistant", "content": answer}]} for answer in answers]


def prepare(section: Dataset, held_out: HeldOut | None = None, resize_embeddings: bool = False) -> tuple[Words, Documents]:
    words = find_words(section, DEBUG_TOKENIZER, resize_embeddings)
    return words, build_documents(words, section, 64, words.tokenizer.vocab_size, held_out or HeldOut())


def test_held_out_documents_that_are_trained_on_are_told() -> None:
    write("a.jsonl", chats("one", "two", "three"))
    _, same = prepare(Dataset(path="a.jsonl"), HeldOut(path=write("b.jsonl", chats("two", "four"))))
    assert same.notes[-1] == "warning: 1 of the 2 held-out documents are trained on too: validation tells little"
    assert "2 documents held out" in same.notes
    _, other = prepare(Dataset(path="a.jsonl"), HeldOut(path=write("c.jsonl", chats("five"))))
    assert other.notes[-1] == "1 documents held out"
    _, share = prepare(Dataset(path=write("d.jsonl", chats(*map(str, range(50))))), HeldOut(fraction=0.3))
    assert share.notes[-1].endswith("documents held out")


def test_held_out_file_beside_a_mix_is_read_as_the_table_that_fits() -> None:
    tables = (
        MixedSource(path=write("a.jsonl", [{"text": "a document"}])),
        MixedSource(path=write("b.jsonl", chats("one", column="dialogue")), columns=Columns(messages="dialogue")),
    )
    _, documents = prepare(Dataset(mix=tables), HeldOut(path=write("c.jsonl", chats("two", column="dialogue"))))
    assert documents.held_out is not None
    assert documents.held_out.sources[0].found.format == "chat"
    with pytest.raises(DataError, match=r"d\.jsonl:1: columns \['words'\] fit no format"):
        prepare(Dataset(mix=tables), HeldOut(path=write("d.jsonl", [{"words": "w"}])))


def test_held_out_chats_beside_text_have_no_template() -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: the data is 'chat', but what is trained on is not"):
        prepare(Dataset(path=write("a.jsonl", [{"text": "t"}])), HeldOut(path=write("b.jsonl", chats("one"))))


def test_tools_that_the_template_does_not_show_are_told() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    rows = [{"messages": TURN}, {"messages": TURN, "tools": [{"name": "look"}]}, {"messages": [TURN[0], call]}]
    _, documents = prepare(Dataset(path=write("a.jsonl", rows)))
    told = "warning: 2 documents have tools or calls of them that the chat template does not show (first a.jsonl:2)"
    assert f"a.jsonl: {told}" in documents.notes
    Path("tools.jinja").write_text("{{ tools }}{% for message in messages %}{{ message.tool_calls }}{% endfor %}" + CHATML)
    _, documents = prepare(Dataset(path="a.jsonl", chat_template="tools.jinja"))
    assert not [note for note in documents.notes if "tools" in note]


def test_somebody_who_speaks_twice_in_a_row_is_told() -> None:
    _, documents = prepare(Dataset(path=write("a.jsonl", [{"messages": TURN}, {"messages": [TURN[0], *TURN]}])))
    assert "a.jsonl: 1 conversations in which somebody speaks twice in a row (first a.jsonl:2)" in documents.notes


def test_generation_prompt_that_ends_inside_a_token_is_told() -> None:
    write("a.jsonl", chats("one"))
    assert prepare(Dataset(path="a.jsonl"))[0].notes == []
    Path("space.jinja").write_text(
        "{% for message in messages %}{{ message.role + ':' + ' ' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (note,) = prepare(Dataset(path="a.jsonl", chat_template="space.jinja"))[0].notes
    assert note.startswith("warning: the generation prompt of space.jinja ends inside a token")


def test_tokens_that_were_added_or_were_not_needed_are_told() -> None:
    write("a.jsonl", chats("one"))
    Path("new.jinja").write_text(CHATML.replace("im_end", "new_end"))
    words, _ = prepare(Dataset(path="a.jsonl", chat_template="new.jinja"), resize_embeddings=True)
    assert words.notes == ["<|new_end|> added to the tokenizer"]
    words, _ = prepare(Dataset(path="a.jsonl"), resize_embeddings=True)
    assert words.notes == ["model.resize_embeddings: the tokenizer has every token that the template writes"]


def test_plain_text_among_chats_is_refused() -> None:
    Path("all").mkdir()
    write("all/a.jsonl", chats("one"))
    Path("all/notes.txt").write_text("notes")
    Path("all/README.md").write_text("# Chats")
    with pytest.raises(DataError, match=r"all/notes\.txt:1: a plain text file, though the data is read as 'chat'; leave it out with a pattern"):
        prepare(Dataset(path="all"))
    assert len(prepare(Dataset(path="all/*.jsonl"))[1].train or []) == 1
