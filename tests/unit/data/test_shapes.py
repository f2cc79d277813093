"""Every format that rows have; and whatever is wrong with a row is said in one sentence that begins with its file and line."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tunelib.config.schema import Columns
from tunelib.data.shapes import Conversation, detect_format, read_continuation, read_conversation, read_text, read_tokens
from tunelib.errors import DataError

Row = dict[str, Any]

COLUMNS = Columns()
WHERE = "rows.jsonl:7"
ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

FORMATS: dict[str, tuple[Row, Columns, tuple[str, str]]] = {
    "chat": ({"messages": [ASK, SAY], "prompt": "q"}, COLUMNS, ("chat", "'messages'")),
    "chat of ShareGPT": ({"conversations": [], "id": 3}, COLUMNS, ("chat", "'conversations'")),
    "chat, both columns": ({"messages": [ASK], "conversations": []}, COLUMNS, ("chat", "'messages'")),
    "chat, renamed": ({"turns": [ASK]}, Columns(messages="turns"), ("chat", "'turns'")),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, COLUMNS, ("prompt_completion", "'prompt' and 'completion'")),
    "instruct": ({"instruction": "q", "output": "a"}, COLUMNS, ("instruct", "'instruction' and 'output'")),
    "instruct, renamed": ({"question": "q", "output": "a"}, Columns(instruction="question"), ("instruct", "'question' and 'output'")),
    "text": ({"text": "t", "url": "u"}, COLUMNS, ("text", "'text'")),
    "tokens": ({"input_ids": [1], "labels": [1]}, COLUMNS, ("tokens", "'input_ids'")),
}


@pytest.mark.parametrize(("row", "columns", "expected"), FORMATS.values(), ids=FORMATS)
def test_format_is_seen_from_the_columns(row: Row, columns: Columns, expected: tuple[str, str]) -> None:
    assert detect_format(row, columns, WHERE) == expected


ALPACA = {"instruction": "Add.", "output": "3"}
CONVERSATIONS: dict[str, tuple[str, Row, Conversation]] = {
    "chat": ("chat", {"messages": [SYSTEM, ASK, SAY]}, Conversation([SYSTEM, ASK, SAY], [None, None, None])),
    "chat as JSON text": ("chat", {"messages": json.dumps([ASK, SAY])}, Conversation([ASK, SAY], [None, None])),
    "content in parts": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}, SAY]},
        Conversation([{"role": "user", "content": "q!"}, SAY], [None, None]),
    ),
    "other keys are kept, and those that are null left out": (
        "chat",
        {"messages": [{**ASK, "name": "Ann", "tool_calls": None}, {**SAY, "reasoning_content": "r"}]},
        Conversation([{**ASK, "name": "Ann"}, {**SAY, "reasoning_content": "r"}], [None, None]),
    ),
    "ShareGPT": (
        "chat",
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
        Conversation([SYSTEM, ASK, SAY], [None, None, False]),
    ),
    "ShareGPT with tools": (
        "chat",
        {"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}, {"from": "observation", "value": "o"}]},
        Conversation([ASK, SAY, {"role": "tool", "content": "o"}], [None, None, None]),
    ),
    "flags": (
        "chat",
        {"messages": [{**ASK, "train": False}, {**SAY, "train": True}, {**SAY, "weight": 1}, {**SAY, "weight": 0.0}, {**SAY, "train": None}]},
        Conversation([ASK, SAY, SAY, SAY, SAY], [False, True, True, False, None]),
    ),
    "both flags": ("chat", {"messages": [ASK, {**SAY, "train": True, "weight": 1}]}, Conversation([ASK, SAY], [None, True])),
    "tools": (
        "chat",
        {"messages": [ASK, CALL, {"role": "tool", "content": "o"}, SAY], "tools": TOOLS},
        Conversation([ASK, {**CALL, "content": ""}, {"role": "tool", "content": "o"}, SAY], [None] * 4, TOOLS),
    ),
    "tools as JSON text": ("chat", {"messages": [ASK, SAY], "tools": json.dumps(TOOLS)}, Conversation([ASK, SAY], [None, None], TOOLS)),
    "no tools": ("chat", {"messages": [ASK, SAY], "tools": " "}, Conversation([ASK, SAY], [None, None])),
    "tools, an empty list": ("chat", {"messages": [ASK, SAY], "tools": "[]"}, Conversation([ASK, SAY], [None, None])),
    "system column": ("chat", {"messages": [ASK, {**SAY, "weight": 1}], "system": "s"}, Conversation([SYSTEM, ASK, SAY], [None, None, True])),
    "empty system column": ("chat", {"messages": [SYSTEM, ASK, SAY], "system": ""}, Conversation([SYSTEM, ASK, SAY], [None] * 3)),
    "prompt and completion": ("prompt_completion", {"prompt": "q", "completion": "a"}, Conversation([ASK, SAY], [None, None])),
    "prompt and completion, system column": (
        "prompt_completion",
        {"prompt": "q", "completion": "a", "system": "s", "tools": TOOLS},
        Conversation([SYSTEM, ASK, SAY], [None] * 3, TOOLS),
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [SYSTEM, ASK, SAY, ASK], "completion": [SAY, ASK, {**SAY, "weight": 0}]},
        Conversation([SYSTEM, ASK, SAY, ASK, SAY, ASK, SAY], [None] * 6 + [False], num_prompt=4),
    ),
    "prompt and completion as messages, system column, a flag in the prompt": (
        "prompt_completion",
        {"prompt": [ASK, {**SAY, "train": True}, ASK], "completion": [SAY], "system": "s"},
        Conversation([SYSTEM, ASK, SAY, ASK, SAY], [None, None, True, None, None], num_prompt=4),
    ),
    "Alpaca": (
        "instruct",
        {**ALPACA, "input": "1 2"},
        Conversation([{"role": "user", "content": "Add.\n\n1 2"}, {**SAY, "content": "3"}], [None, None]),
    ),
    "Alpaca without input": ("instruct", {**ALPACA, "input": ""}, Conversation([{**ASK, "content": "Add."}, {**SAY, "content": "3"}], [None, None])),
    "Alpaca, input null, system column": (
        "instruct",
        {**ALPACA, "input": None, "system": "s", "tools": "not read"},
        Conversation([SYSTEM, {**ASK, "content": "Add."}, {**SAY, "content": "3"}], [None] * 3),
    ),
}


@pytest.mark.parametrize(("format", "row", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversation_is_read(format: str, row: Row, expected: Conversation) -> None:
    before = json.dumps(row)
    assert read_conversation(row, format, COLUMNS, WHERE) == expected
    assert json.dumps(row) == before  # a row is never changed


def test_columns_are_read_by_the_names_given() -> None:
    columns = Columns(messages="turns", tools="functions", system="rules", text="body", input_ids="ids", mask="train")
    row = {"turns": [ASK, SAY], "functions": TOOLS, "rules": "s", "messages": "not read", "tools": 3, "system": 3}
    assert read_conversation(row, "chat", columns, WHERE) == Conversation([SYSTEM, ASK, SAY], [None] * 3, TOOLS)
    assert read_text({"body": "t", "text": 3}, columns, WHERE) == "t"
    assert read_tokens({"ids": [1, 2], "train": [0, 1]}, columns, WHERE) == ([1, 2], [False, True])


def test_continuation_and_text_are_read_as_they_are() -> None:
    joined = read_continuation({"prompt": "q ", "completion": " a", "system": "", "tools": None}, COLUMNS, WHERE)
    assert (joined.prompt, joined.completion) == ("q ", " a")
    assert read_text({"text": " t\n"}, COLUMNS, WHERE) == " t\n"


def test_tokens_are_trained_as_labels_or_mask_say() -> None:
    assert read_tokens({"input_ids": [5, 6]}, COLUMNS, WHERE) == ([5, 6], [True, True])
    assert read_tokens({"input_ids": [5, 6], "labels": [-100, 6]}, COLUMNS, WHERE) == ([5, 6], [False, True])
    assert read_tokens({"input_ids": [5, 6], "labels": None, "loss_mask": [1, 0]}, COLUMNS, WHERE) == ([5, 6], [True, False])
    assert read_tokens({"input_ids": [5, 6], "loss_mask": [True, False]}, COLUMNS, WHERE) == ([5, 6], [True, False])
    assert read_tokens({"input_ids": []}, COLUMNS, WHERE) == ([], [])


def chat(*messages: Any, **others: Any) -> Callable[[], object]:
    return lambda: read_conversation({"messages": list(messages), **others}, "chat", COLUMNS, WHERE)


def row_of(format: str, **row: Any) -> Callable[[], object]:
    return lambda: read_conversation(row, format, COLUMNS, WHERE)


def continuation(**row: Any) -> Callable[[], object]:
    return lambda: read_continuation(row, COLUMNS, WHERE)


def tokens(**row: Any) -> Callable[[], object]:
    return lambda: read_tokens(row, COLUMNS, WHERE)


def detect(**row: Any) -> Callable[[], object]:
    return lambda: detect_format(row, COLUMNS, WHERE)


NOT_A_FLAG = "a message is trained (1, true) or not (0, false)"
NAMES = "dataset.columns names other columns"
ELSE = f"{NAMES}, and rows of another format are a source of their own with [[dataset.mix]]"
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no format": (
        detect(words="w", id=1),
        "columns ['id', 'words'] fit no format, which takes 'messages' for chat; 'prompt' and 'completion' for prompt_completion; "
        f"'instruction' and 'output' for instruct; 'text' for text; 'input_ids' for tokens: {NAMES}",
    ),
    "two formats": (
        detect(messages=[], text="t"),
        "columns ['messages', 'text'] fit chat and text: choose one with dataset.format",
    ),
    "no column of messages": (row_of("chat", text="t"), f"no column 'messages' among ['text'], though the data is read as 'chat'; {ELSE}"),
    "messages null": (row_of("chat", messages=None), "column 'messages' is not a list of messages: null"),
    "no messages": (chat(), "column 'messages' is not a list of messages: []"),
    "one message": (row_of("chat", messages=ASK), 'column \'messages\' is not a list of messages: {"role": "user", "content": "q"}'),
    "messages as words": (
        row_of("chat", messages="words"),
        "column 'messages' is text, and not the JSON of a list: Expecting value: line 1 column 1 (char 0)",
    ),
    "messages as JSON of words": (row_of("chat", messages='"words"'), "column 'messages' is not a list of messages: \"words\""),
    "half of a character in JSON": (
        row_of("chat", messages='[{"role": "user", "content": "\\ud800"}]'),
        "column 'messages' holds \\ud800, which is half of a character; no tokenizer can read it",
    ),
    "message as words": (chat("words"), 'message 0 has no role among system, user, assistant, tool: "words"'),
    "no role": (chat(ASK, {"content": "a"}), 'message 1 has no role among system, user, assistant, tool: {"content": "a"}'),
    "strange role": (
        chat({"role": "bot", "content": "é"}),
        'message 0 has no role among system, user, assistant, tool: {"role": "bot", "content": "é"}',
    ),
    "role in a list": (
        chat({"role": ["user"], "content": "q"}),
        'message 0 has no role among system, user, assistant, tool: {"role": ["user"], "content": "q"}',
    ),
    "strange sender": (
        chat({"from": "me", "value": "q"}),
        "message 0 is from 'me'; known are system, user, assistant, tool, human, gpt, chatgpt, model, observation, function_response",
    ),
    "sender in a list": (
        chat({"from": ["human"], "value": "q"}),
        "message 0 is from ['human']; known are system, user, assistant, tool, human, gpt, chatgpt, model, observation, function_response",
    ),
    "no content": (chat({"role": "user"}), 'message 0 (user) has no text in \'content\': {"role": "user"}'),
    "no value": (chat({"from": "human"}), 'message 0 (user) has no text in \'content\': {"role": "user", "content": null}'),
    "answer without content": (
        chat(ASK, {"role": "assistant", "content": None}),
        'message 1 (assistant) has no text in \'content\': {"role": "assistant", "content": null}',
    ),
    "content a number": (
        chat({"role": "user", "content": 3, "note": "x" * 80}),
        f'message 0 (user) has no text in \'content\': {{"role": "user", "content": 3, "note": "{"x" * 37}...',
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image", "url": "u"}]}),
        'message 0: part 1 of its content is not text: {"type": "image", "url": "u"}',
    ),
    "a part as words": (chat({"role": "user", "content": ["q"]}), 'message 0: part 0 of its content is not text: "q"'),
    "weight of a half": (chat(ASK, {**SAY, "weight": 0.5}), f"message 1: 'weight' is 0.5; {NOT_A_FLAG}"),
    "flag in words": (chat(ASK, {**SAY, "train": "yes"}), f"message 1: 'train' is \"yes\"; {NOT_A_FLAG}"),
    "flags that contradict": (chat(ASK, {**SAY, "train": True, "weight": 0}), "message 1: 'train' and 'weight' contradict each other"),
    "question flagged": (
        chat({**ASK, "weight": 1}, SAY),
        'message 0 is flagged to be trained, but only the assistant\'s are; dataset.train_on = "all" trains every token',
    ),
    "question of ShareGPT flagged": (
        chat({"from": "human", "value": "q", "train": True}, SAY),
        'message 0 is flagged to be trained, but only the assistant\'s are; dataset.train_on = "all" trains every token',
    ),
    "system prompt late": (chat(ASK, SYSTEM, SAY), "message 1 is the system's; a system prompt stands first, and there is one"),
    "two system prompts": (
        chat(SYSTEM, ASK, SAY, system="t"),
        "there are both a column 'system' and a system message; leave one of them out",
    ),
    "system column and a late system prompt": (
        chat(ASK, SYSTEM, SAY, system="t"),
        "message 1 is the system's; a system prompt stands first, and there is one",
    ),
    "system column a number": (chat(ASK, SAY, system=3), "column 'system' is not text: 3"),
    "tool without call": (
        chat(ASK, {"role": "tool", "content": "o"}, SAY),
        "message 1 is a tool's answer, but the assistant has called none before",
    ),
    "nobody answers": (chat(SYSTEM, ASK), "no message is the assistant's"),
    "tools as words": (
        chat(ASK, SAY, tools="words"),
        "column 'tools' is text, and not the JSON of a list: Expecting value: line 1 column 1 (char 0)",
    ),
    "one tool": (
        chat(ASK, SAY, tools=TOOLS[0]),
        'column \'tools\' is not a list of tools, which are objects: {"type": "function", "function": {"name": "f"}}',
    ),
    "names of tools": (chat(ASK, SAY, tools=["f"]), "column 'tools' is not a list of tools, which are objects: [\"f\"]"),
    "no prompt": (
        row_of("prompt_completion", completion="a"),
        f"no column 'prompt' among ['completion'], though the data is read as 'prompt_completion'; {ELSE}",
    ),
    "no completion": (
        row_of("prompt_completion", prompt="q"),
        f"no column 'completion' among ['prompt'], though the data is read as 'prompt_completion'; {ELSE}",
    ),
    "completion as messages, prompt not": (
        row_of("prompt_completion", prompt="q", completion=[SAY]),
        'column \'completion\' is not text: [{"role": "assistant", "content": "a"}]',
    ),
    "prompt as messages, completion not": (
        row_of("prompt_completion", prompt=[ASK], completion="a"),
        "column 'completion' is text, and not the JSON of a list: Expecting value: line 1 column 1 (char 0)",
    ),
    "no instruction": (
        row_of("instruct", output="a"),
        f"no column 'instruction' among ['output'], though the data is read as 'instruct'; {ELSE}",
    ),
    "no output": (row_of("instruct", instruction="q", output=None), "column 'output' is not text: null"),
    "input a number": (row_of("instruct", instruction="q", input=3, output="a"), "column 'input' is not text: 3"),
    "messages without template": (
        continuation(prompt=[ASK], completion=[SAY]),
        "column 'prompt' holds messages, which need a chat template: name one with dataset.chat_template",
    ),
    "system prompt without template": (
        continuation(prompt="q", completion="a", system="s"),
        "a system prompt or tools need a chat template: name one with dataset.chat_template",
    ),
    "continuation without prompt": (
        continuation(completion="a"),
        f"no column 'prompt' among ['completion'], though the data is read as 'prompt_completion'; {ELSE}",
    ),
    "no text": (
        lambda: read_text({"words": "w"}, COLUMNS, WHERE),
        f"no column 'text' among ['words'], though the data is read as 'text'; {ELSE}",
    ),
    "text null": (lambda: read_text({"text": None}, COLUMNS, WHERE), "column 'text' is not text: null"),
    "no ids": (tokens(ids=[1]), f"no column 'input_ids' among ['ids'], though the data is read as 'tokens'; {ELSE}"),
    "ids that are no numbers": (tokens(input_ids=[1, 2.0]), "column 'input_ids' is not a list of whole numbers: [1, 2.0]"),
    "ids in text": (tokens(input_ids="1 2"), "column 'input_ids' is not a list of whole numbers: \"1 2\""),
    "labels and mask": (
        tokens(input_ids=[1], labels=[1], loss_mask=[1]),
        "there are both 'labels' and 'loss_mask'; leave one of them out",
    ),
    "labels too few": (tokens(input_ids=[1, 2], labels=[1]), "'input_ids' has 2 numbers, but 'labels' has 1"),
    "labels shifted": (
        tokens(input_ids=[5, 6, 7], labels=[-100, 7, 7]),
        "labels[1] is 7, but the token there is 6: a label is the token itself, not shifted, or -100",
    ),
    "mask of twos": (tokens(input_ids=[5, 6], loss_mask=[1, 2]), "loss_mask[1] is 2, not 0 or 1"),
}


@pytest.mark.parametrize(("read", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_row_is_named_with_file_and_line(read: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read()
    assert str(caught.value) == f"{WHERE}: {message}"
