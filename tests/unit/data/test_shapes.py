"""Whatever is wrong with a row's shape is said with its file and line."""

from typing import Any

import pytest

from tunelib.config.schema import Columns
from tunelib.data.shapes import detect_format, messages_of, text_of
from tunelib.errors import DataError

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
