"""Whatever is wrong with a row is said with its file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunelib.config.schema import Columns
from tunelib.data.sources import detect_format, digest_file, messages_of, read_rows, text_of
from tunelib.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_broken_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path / "data.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:3: ")


def test_rows_keep_their_line_numbers_over_empty_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "a"}\n\n  \n{"text": "b\u2028c"}\r\n{"text": "last line without its end"}')
    assert [(number, row["text"]) for number, row in read_rows(path)] == [(1, "a"), (4, "b\u2028c"), (5, "last line without its end")]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"book{suffix}", "One.\n\nTwo.\n")
    assert list(read_rows(path)) == [(1, {"text": "One.\n\nTwo.\n"})]


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    bad = {
        tmp_path / "none.jsonl": "no such data file",
        tmp_path / "folder.jsonl": "is a directory",
        write(tmp_path / "table.csv", "a,b"): ".csv is not a kind",
        write(tmp_path / "bare", ""): "without a suffix",
        write(tmp_path / "bytes.txt", b"ab\xff"): "byte 2 is not UTF-8",
    }
    for path, words in bad.items():
        with pytest.raises(DataError, match=words) as caught:
            list(read_rows(path))
        assert str(caught.value).startswith(str(path))


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "text",
        {"role": "user"},
        ["text"],
        [{"content": "no role"}],
        [{"role": "bot", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
        [{"role": "user", "content": "nobody answers"}],
    ],
    ids=str,
)
def test_bad_messages_are_named_with_file_and_line(messages: Any) -> None:
    with pytest.raises(DataError) as caught:
        messages_of({"messages": messages}, "chat", Columns(), "file:7")
    assert str(caught.value).startswith("file:7: ")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "do"},
        {"output": "done"},
        {"instruction": 3, "output": "x"},
        {"instruction": "x", "output": None},
        {"instruction": "x", "input": 3, "output": "x"},
    ],
)
def test_bad_instructions_are_named_with_file_and_line(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        messages_of(row, "instruct", Columns(), "file:7")
    assert str(caught.value).startswith("file:7: ")


@pytest.mark.parametrize("row", [{}, {"text": None}, {"text": ["a"]}, {"words": "a"}])
def test_bad_text_is_named_with_file_and_line(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        text_of(row, Columns(), "file:7")
    assert str(caught.value).startswith("file:7: ")


def test_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        text_of({"text": ["x" * 10_000]}, Columns(), "file:7")
    assert len(str(caught.value)) < 200


def test_instruction_becomes_a_question_and_an_answer() -> None:
    row = {"ask": "Add.", "data": "1 2", "reply": "3"}
    columns = Columns(instruction="ask", input="data", output="reply")
    assert messages_of(row, "instruct", columns, "f:1") == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    for empty in ({"data": ""}, {"data": None}):
        assert messages_of(row | empty, "instruct", columns, "f:1")[0]["content"] == "Add."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES, "id": 3}, "chat"),
        ({"instruction": "a", "output": "b"}, "instruct"),
        ({"text": "a", "source": "web"}, "text"),
    ],
)
def test_format_is_known_by_its_columns(row: dict[str, Any], expected: str) -> None:
    assert detect_format(row, Columns(), "f:1") == expected


@pytest.mark.parametrize("row", [{}, {"instruction": "a"}, {"text": "a", "messages": []}, {"conversations": []}])
def test_doubtful_format_is_asked_for_and_not_guessed(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"dataset\.format") as caught:
        detect_format(row, Columns(), "file:1")
    assert str(caught.value).startswith("file:1: ")


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name, json.dumps(value)) for name, value in (("a", 1), ("b", 1), ("c", 2)))
    assert digest_file(one) == digest_file(same) != digest_file(other)
