"""Chat templates: conversations to tokens, with a mark on every token that the assistant said.

Templates are rendered as transformers renders them, in a sandbox. Where the assistant speaks is found, in this order, by the
template's own ``{% generation %}`` tags; by rendering once with each answer replaced by a marker, which counts only if putting
the answers back gives the real rendering; by rendering prefixes of the conversation, which counts only if each is a prefix of
the whole. Without tags a span ends with the end-of-turn token, which is trained; what the template puts after that is not. Tags
decide for themselves.
"""

import datetime
import json
import re
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED_TEMPLATES = {"chatml": CHATML}

# Marks set around answers in a rendering are private-use characters of plane 15; two that do not occur in the conversation.
FIRST_MARK = 0xF0000
# Templates that print the date print this one, Llama 3.1's own default: what is trained on must not depend on the day.
DATE = datetime.datetime(2024, 7, 26)
MARKS = "_tunelib_marks"
Span = tuple[int, int]
Message = dict[str, Any]


class ChatTemplate:
    """A chat template together with the tokenizer that reads its output.

    Args:
        tokenizer: gives special tokens, and the template unless one is named.
        choice: "" for the tokenizer's own, a key of NAMED_TEMPLATES, or a path ending in .jinja.
    """

    def __init__(self, tokenizer: Tokenizer, choice: str = ""):
        self.tokenizer = tokenizer
        self.source = _find_source(tokenizer, choice)
        self.name = choice or str(tokenizer.folder)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=DATE.strftime)
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.name}:{error.lineno}: the chat template is not valid Jinja: {error}") from None
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{self.name}: the chat template is not valid Jinja: {error}") from None
        self._has_generation_tags = bool(re.search(r"{%-?\s*generation\b", self.source))

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, equal to ``transformers``' ``apply_chat_template(..., tokenize=False)`` on the day of DATE."""
        marks = _choose_marks(messages)
        return _cut_marks(self._render(messages, add_generation_prompt, marks), marks)[0]

    def encode(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and for each whether the assistant said it (its end-of-turn token included)."""
        text, spans = self._find_spans(messages)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        spoken, remaining = [], sorted(spans)
        for start, end in encoded.offsets:
            while remaining and remaining[0][1] <= start:
                remaining.pop(0)
            spoken.append(bool(remaining) and remaining[0][0] < end and start < end)
        return encoded.ids, spoken

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation that the assistant is to answer."""
        return self.tokenizer.encode(self.render(messages, add_generation_prompt=True), add_special_tokens=False).ids

    def _render(self, messages: list[Message], add_generation_prompt: bool, marks: tuple[str, str]) -> str:
        """The rendering, with ``marks`` around what generation tags enclose."""
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._template.environment.globals[MARKS] = marks
        try:
            return self._template.render(
                messages=given, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.tokenizer.special
            )
        except Exception as error:  # a template is a program, and may fail in any way that programs do
            raise DataError(f"{self.name}: the chat template refuses the conversation: {error}") from None

    def _find_spans(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered text and the [start, end) characters of every answer, its end-of-turn token included."""
        if self._has_generation_tags:
            marks = _choose_marks(messages)
            return _cut_marks(self._render(messages, False, marks), marks)
        text = self.render(messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._spans_by_markers(messages, answers, text)
        if spans is not None:
            return text, [self._with_end_of_turn(text, span) for span in spans]
        return text, self._spans_by_prefixes(messages, answers, text)

    def _spans_by_markers(self, messages: list[Message], answers: list[int], text: str) -> list[Span] | None:
        begin, end = marks = _choose_marks(messages)
        marked = [{**message, "content": f"{begin}{index}{end}"} if index in answers else message for index, message in enumerate(messages)]
        try:
            pieces = re.split(f"{begin}([0-9]+){end}", self._render(marked, False, marks))
        except DataError:
            return None  # a template that looks into answers
        if [int(piece) for piece in pieces[1::2]] != answers:
            return None
        contents = [messages[index]["content"] for index in answers]
        for candidate in (contents, [content.strip() for content in contents]):
            rebuilt, spans = pieces[0], []
            for content, after in zip(candidate, pieces[2::2], strict=True):
                spans.append((len(rebuilt), len(rebuilt) + len(content)))
                rebuilt += content + after
            if rebuilt == text:
                return spans
        return None

    def _spans_by_prefixes(self, messages: list[Message], answers: list[int], text: str) -> list[Span]:
        spans = []
        for index in answers:
            before = self.render(messages[:index], add_generation_prompt=True)
            through = self.render(messages[: index + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    "the chat template does not show where the assistant speaks: "
                    "give it {% generation %} tags, or name another with dataset.chat_template"
                )
            ends = [place + len(token) for token in self.tokenizer.special_texts if (place := through.rfind(token)) >= len(before)]
            spans.append((len(before), max(ends, default=len(through))))
        return spans

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """The span, up to the end of the special token that follows it directly or after white space; bos begins the next turn."""
        start, end = span
        after = end + len(text[end:]) - len(text[end:].lstrip())
        bos, eos = (self.tokenizer.special.get(name) for name in ("bos_token", "eos_token"))
        for token in self.tokenizer.special_texts:
            if text.startswith(token, after) and (token != bos or token == eos):
                return start, after + len(token)
        return start, end


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: what the assistant says, set between marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a class attribute)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Turn the block into a call that marks its output."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        """The block's output between marks."""
        begin, end = cast(tuple[str, str], self.environment.globals[MARKS])
        return f"{begin}{caller()}{end}"


def _choose_marks(messages: list[Message]) -> tuple[str, str]:
    """Two characters that do not occur in a conversation."""
    used = set(json.dumps(messages, ensure_ascii=False, default=str))
    begin, end, *_ = (mark for mark in map(chr, range(FIRST_MARK, FIRST_MARK + len(used) + 2)) if mark not in used)
    return begin, end


def _cut_marks(marked: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """A rendering without its marks, and what they enclosed."""
    begin, end = marks
    text, spans, start = "", [], 0
    for piece in re.split(f"([{begin}{end}])", marked):
        if piece == begin:
            start = len(text)
        elif piece == end:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def _find_source(tokenizer: Tokenizer, choice: str) -> str:
    if choice.endswith(".jinja"):
        try:
            return Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"dataset.chat_template = {choice!r} cannot be read: {error}") from None
    if choice:
        if choice not in NAMED_TEMPLATES:
            raise DataError(f"dataset.chat_template = {choice!r} is neither a named template ({', '.join(NAMED_TEMPLATES)}) nor a .jinja file")
        return NAMED_TEMPLATES[choice]
    if tokenizer.chat_template is None:
        raise DataError(f"the tokenizer in {tokenizer.folder} has no chat template: name one with dataset.chat_template, such as 'chatml'")
    return tokenizer.chat_template


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
