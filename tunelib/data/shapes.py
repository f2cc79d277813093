"""Rows to what they say: which format a row has, and its conversation, its text, or its tokens.

Everything wrong with a row is a DataError that begins with ``file:line``.
"""

import json
from dataclasses import dataclass
from typing import Any

from tunelib.config.schema import Columns
from tunelib.data.json_rows import find_lone_surrogate, has_half_escape
from tunelib.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""What "from" says in data of ShareGPT's layout → role."""
NEEDED_COLUMNS = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruct": ("instruction", "output"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
"""Format → the columns, by their names in [dataset.columns], that make a row one of it."""
FLAGS = ("train", "weight")
UNTRAINED = -100
"""What stands in a column of labels where a token is not trained, as in Hugging Face's data sets."""
Row = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with a role and what the template wants of them.

    Attributes:
        flags: for each message whether it is trained, None where the data leave it to dataset.train_on.
        tools: what the template is to describe, None where there is nothing.
        num_prompt: how many messages come before what is to be learnt: answers among them are trained only where that is asked for.
    """

    messages: list[Message]
    flags: list[bool | None]
    tools: list[Any] | None = None
    num_prompt: int = 0


@dataclass(frozen=True)
class Continuation:
    """A prompt and what follows it, as plain texts."""

    prompt: str
    completion: str


def detect_format(row: Row, columns: Columns, where: str) -> tuple[str, str]:
    """The format of a row by the columns it has, and which columns those are.

    Raises:
        DataError: none fits, or more than one.
    """
    names = {format: _columns_of(format, row, columns) for format in NEEDED_COLUMNS}
    found = [format for format, needed in names.items() if all(column in row for column in needed)]
    if len(found) > 1:
        raise DataError(f"{where}: columns {sorted(row)} fit {' and '.join(found)}: choose one with dataset.format")
    if not found:
        known = "; ".join(f"{' and '.join(map(repr, needed))} for {format}" for format, needed in names.items())
        raise DataError(f"{where}: columns {sorted(row)} fit no format, which takes {known}: dataset.columns names other columns")
    return found[0], " and ".join(repr(name) for name in names[found[0]])


def read_conversation(row: Row, format: str, columns: Columns, where: str) -> Conversation:
    """The conversation of a row of a format that has one; raises DataError."""
    _check_columns(row, format, columns, where)
    tools = _read_tools(row.get(columns.tools), columns.tools, where) if format != "instruct" else None
    flags: list[bool | None]
    num_prompt = 0
    if format == "chat":
        messages, flags = _read_messages(row, _columns_of(format, row, columns)[0], where)
    elif format == "instruct":
        instruction, output = (_text_in(row, column, where) for column in (columns.instruction, columns.output))
        material = _text_in(row, columns.input, where) if row.get(columns.input) else ""
        question = f"{instruction}\n\n{material}" if material else instruction
        messages, flags = [{"role": "user", "content": question}, {"role": "assistant", "content": output}], [None, None]
    elif isinstance(row.get(columns.prompt), str):
        prompt, completion = (_text_in(row, column, where) for column in (columns.prompt, columns.completion))
        messages, flags = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], [None, None]
    else:
        prompts, prompt_flags = _read_messages(row, columns.prompt, where)
        answers, answer_flags = _read_messages(row, columns.completion, where)
        messages, flags, num_prompt = prompts + answers, prompt_flags + answer_flags, len(prompts)
    _check_order(messages, where)
    if row.get(columns.system):
        if messages[0]["role"] == "system":
            raise DataError(f"{where}: there are both a column {columns.system!r} and a system message; leave one of them out")
        messages, flags = [{"role": "system", "content": _text_in(row, columns.system, where)}, *messages], [None, *flags]
        num_prompt += num_prompt > 0
    return Conversation(messages, flags, tools, num_prompt)


def read_continuation(row: Row, columns: Columns, where: str) -> Continuation:
    """A prompt and its completion that no template joins; raises DataError."""
    _check_columns(row, "prompt_completion", columns, where)
    for column in (columns.prompt, columns.completion):
        if isinstance(row.get(column), list):
            raise DataError(f"{where}: column {column!r} holds messages, which need a chat template: name one with dataset.chat_template")
    if row.get(columns.system) or row.get(columns.tools):
        raise DataError(f"{where}: a system prompt or tools need a chat template: name one with dataset.chat_template")
    return Continuation(*(_text_in(row, column, where) for column in (columns.prompt, columns.completion)))


def read_text(row: Row, columns: Columns, where: str) -> str:
    """The document of a text row; raises DataError."""
    _check_columns(row, "text", columns, where)
    return _text_in(row, columns.text, where)


def read_tokens(row: Row, columns: Columns, where: str) -> tuple[list[int], list[bool]]:
    """The ids of a pre-tokenised row, and which of them are trained; raises DataError."""
    _check_columns(row, "tokens", columns, where)
    ids = _ints_in(row, columns.input_ids, where)
    has_labels, has_mask = (row.get(column) is not None for column in (columns.labels, columns.mask))
    if has_labels and has_mask:
        raise DataError(f"{where}: there are both {columns.labels!r} and {columns.mask!r}; leave one of them out")
    if not has_labels and not has_mask:
        return ids, [True] * len(ids)
    column = columns.labels if has_labels else columns.mask
    marks = _ints_in(row, column, where)
    if len(marks) != len(ids):
        raise DataError(f"{where}: {columns.input_ids!r} has {len(ids)} numbers, but {column!r} has {len(marks)}")
    for place, (token, mark) in enumerate(zip(ids, marks, strict=True)):
        if has_labels and mark not in (token, UNTRAINED):
            raise DataError(
                f"{where}: {column}[{place}] is {mark}, but the token there is {token}: a label is the token itself, not shifted, or {UNTRAINED}"
            )
        if has_mask and mark not in (0, 1):
            raise DataError(f"{where}: {column}[{place}] is {mark}, not 0 or 1")
    return ids, [mark != UNTRAINED for mark in marks] if has_labels else [mark == 1 for mark in marks]


def _columns_of(format: str, row: Row, columns: Columns) -> tuple[str, ...]:
    """The columns that a row needs for a format; ShareGPT's own name stands in where nothing else was asked for."""
    names = tuple(getattr(columns, name) for name in NEEDED_COLUMNS[format])
    return ("conversations",) if names == ("messages",) and "messages" not in row and "conversations" in row else names


def _check_columns(row: Row, format: str, columns: Columns, where: str) -> None:
    """Make sure that a row has the columns that its format needs; raises DataError."""
    for column in _columns_of(format, row, columns):
        if column not in row:
            raise DataError(
                f"{where}: no column {column!r} among {sorted(row)}, though the data is read as {format!r}; dataset.columns names other columns, "
                "and rows of another format are a source of their own with [[dataset.mix]]"
            )


def _read_messages(row: Row, column: str, where: str) -> tuple[list[Message], list[bool | None]]:
    listed = row.get(column)
    if isinstance(listed, str):  # a CSV file holds lists as JSON
        listed = _parse_json(listed, column, where)
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{where}: column {column!r} is not a list of messages: {_shorten(listed)}")
    messages = [_read_message(message, f"{where}: message {number}") for number, message in enumerate(listed)]
    return messages, [_read_flag(message, f"{where}: message {number}") for number, message in enumerate(listed)]


def _read_message(message: Any, where: str) -> Message:
    """A message with the keys that templates know, without our flags."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        role = SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise DataError(f"{where} is from {message['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        others = {key: value for key, value in message.items() if key not in ("from", "value", *FLAGS)}
        message = {"role": role, "content": message.get("value"), **others}
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"{where} has no role among {', '.join(ROLES)}: {_shorten(message)}")
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where} ({message['role']}) has no text in 'content': {_shorten(message)}")
    return {**{key: value for key, value in message.items() if key not in FLAGS and value is not None}, "content": content}


def _join_parts(parts: list[Any], where: str) -> str:
    """Content given as parts, all of which must be text."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{where}: part {number} of its content is not text: {_shorten(parts[number])}")
    return "".join(str(text) for text in texts)


def _read_flag(message: Message, where: str) -> bool | None:
    given = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {name!r} is {_shorten(value)}; a message is trained (1, true) or not (0, false)")
    if len(set(map(bool, given.values()))) > 1:
        raise DataError(f"{where}: 'train' and 'weight' contradict each other")
    flag = next((bool(value) for value in given.values()), None)
    role = message["role"] if "role" in message else SHAREGPT_ROLES[message["from"]]
    if flag and role != "assistant":
        raise DataError(f'{where} is flagged to be trained, but only the assistant\'s are; dataset.train_on = "all" trains every token')
    return flag


def _check_order(messages: list[Message], where: str) -> None:
    """Make sure that the order of the roles is one that any template can mean."""
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles):
        if role == "system" and number:
            raise DataError(f"{where}: message {number} is the system's; a system prompt stands first, and there is one")
        if role == "tool" and "assistant" not in roles[:number]:
            raise DataError(f"{where}: message {number} is a tool's answer, but the assistant has called none before")
    if "assistant" not in roles:
        raise DataError(f"{where}: no message is the assistant's")


def _read_tools(value: Any, column: str, where: str) -> list[Any] | None:
    if isinstance(value, str):
        value = _parse_json(value, column, where) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: column {column!r} is not a list of tools, which are objects: {_shorten(value)}")
    return value


def _parse_json(text: str, column: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: column {column!r} is text, and not the JSON of a list: {error}") from None
    if has_half_escape(text) and (half := find_lone_surrogate({column: value})):
        raise DataError(f"{where}: column {column!r} holds {half}, which is half of a character; no tokenizer can read it")
    return value


def _text_in(row: Row, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"{where}: column {column!r} is not text: {_shorten(row[column])}")
    return row[column]


def _ints_in(row: Row, column: str, where: str) -> list[int]:
    values = row[column]
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise DataError(f"{where}: column {column!r} is not a list of whole numbers: {_shorten(values)}")
    return values


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
