"""Chat templates: conversations to tokens, with a mark on every token that the assistant said.

Templates are rendered as transformers renders them, in a sandbox. Where the assistant speaks is found, in this order,

1. by the template's own ``{% generation %}`` tags;
2. by rendering once with each answer replaced by a marker, which counts only if putting the answers back gives the real rendering;
   what stands between the generation prompt and the answer, such as an empty thinking block, is the assistant's too;
3. by rendering prefixes of the conversation, which counts only if each is a prefix of the whole;
4. by the generation prompt, which counts only if it stands in the rendering as often as the assistant speaks.

Tool calls and reasoning that are kept beside an answer's text are found by 1, 3 and 4.

Without tags a span ends with the end-of-turn token, which is trained; what the template puts after that is not. Tags decide for
themselves. Special tokens that are written in the conversation itself are text: only the template writes special tokens.
"""

import bisect
import datetime
import difflib
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import numpy as np

from tunelib.data.sandbox import Sandbox
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set intro = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set intro = '' %}{% endif %}"
    "{% for turn in turns %}"
    "{% if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('the roles must alternate user, assistant, user, …, after a system prompt at most') }}{% endif %}"
    "{% set content = (intro if loop.first else '') + turn['content'] %}"
    "{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
NAMED_TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3}
NO_TEMPLATE = "none"

# Marks set into a conversation are private-use characters of plane 15 that do not occur in it.
FIRST_MARK = 0xF0000
# Templates that print the date print this one, Llama 3.1's own default: what is trained on must not depend on the day.
DATE = datetime.datetime(2024, 7, 26)
MARKS = "_tunelib_marks"
# What looks like a special token in a template's rendering, in the spellings that published templates use.
CONTROL_TOKEN = re.compile(r"<\|[^\s|<>]+\|>|</?s>|<(?:start|end)_of_turn>")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that data and templates have for what an assistant thinks; as transformers does it, templates get it under the first two."""
Span = tuple[int, int]
Message = dict[str, Any]
# The smallest conversation: how a template writes it shows how it writes any.
QUESTION: Message = {"role": "user", "content": "a"}
ANSWER: Message = {"role": "assistant", "content": "b"}


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Attributes:
        ids: N token ids.
        spoken: index of an assistant message → N bools, which tokens it said; all under the key -1 where the template's tags do not
            mark one span for each message.
        has_special_text: the conversation spells out special tokens, which were read as text.
    """

    ids: list[int]
    spoken: dict[int, np.ndarray]
    has_special_text: bool


class ChatTemplate:
    """A chat template together with the tokenizer that reads its output.

    Args:
        tokenizer: gives the special tokens that the template may name.
        name: where the source comes from, for messages.
        source: Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, source: str):
        self.tokenizer, self.name, self.source = tokenizer, name, source
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=DATE.strftime)
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.name}:{error.lineno}: the chat template is not valid Jinja: {error}") from None
        except Exception as error:  # too deep for the parser or for Python's compiler, or a number with too many digits
            raise DataError(f"{self.name}: the chat template is not valid Jinja: {error}") from None
        self._environment = environment
        self._has_generation_tags = bool(re.search(r"{%-?\s*generation\b", self.source))

    def render(self, messages: list[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, equal to ``transformers``' ``apply_chat_template(..., tokenize=False)`` on the day of DATE."""
        marks = _choose_marks([messages, tools], 2)
        return _cut_marks(self._render(messages, tools, add_generation_prompt, marks), marks)[0]

    def encode(
        self, messages: list[Message], tools: list[Any] | None = None, *, parse_special_tokens: bool = False, by_message: bool = True
    ) -> EncodedChat:
        """Tokens of a conversation, and which of them each assistant message said (its end-of-turn token included).

        Args:
            parse_special_tokens: special tokens written in the conversation are those tokens, not text.
            by_message: whether it matters which answer said what; where it does not, the key of all may be -1.
        """
        mark = "" if parse_special_tokens else self._choose_break(messages, tools)
        if mark:
            text, spans = self._find_spans(self._break_special(messages, mark), self._break_special(tools, mark))
            ids, offsets = self._encode_broken(text, mark)
        else:
            text, spans = self._find_spans(messages, tools)
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            ids, offsets = encoded.ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        owners = answers if len(spans) == len(answers) and (not by_message or self._tags_each_answer(messages, tools, answers)) else [-1] * len(spans)
        spoken = {owner: np.zeros(len(ids), dtype=bool) for owner in owners}
        for owner, (start, end) in zip(owners, spans, strict=True):
            spoken[owner] |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
        return EncodedChat(ids, spoken, bool(mark))

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation that the assistant is to answer."""
        mark = self._choose_break(messages, None)
        text = self.render(self._break_special(messages, mark) if mark else messages, add_generation_prompt=True)
        return self._encode_broken(text, mark)[0] if mark else self.tokenizer.encode(text, add_special_tokens=False).ids

    def find_missing_tokens(self) -> list[str]:
        """Special tokens that the template writes around a conversation, but that the tokenizer would read as plain text."""
        for messages in ([{"role": "system", "content": "s"}, QUESTION, ANSWER], [QUESTION, ANSWER]):
            try:
                text = self.render(messages) + self.render(messages[:-1], add_generation_prompt=True)
            except DataError:
                continue  # such as a template without system prompts
            return [token for token in dict.fromkeys(CONTROL_TOKEN.findall(text)) if self.tokenizer.id_of(token) is None]
        return []

    def shows_tools(self, messages: list[Message], tools: list[Any] | None) -> bool:
        """Whether the tools and the calls of a conversation, where it has any, are seen in its rendering."""
        without_calls = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if not tools and without_calls == messages:
            return True
        text = self.render(messages, tools)
        try:
            hides_tools = bool(tools) and self.render(messages) == text
            return not hides_tools and (without_calls == messages or self.render(without_calls, tools) != text)
        except DataError:
            return True  # a template that looks at them

    def ends_inside_a_token(self) -> bool:
        """Whether the generation prompt ends where no token ends: the model would then see other tokens in use than in training."""
        try:
            prompt, whole = self.encode_prompt([QUESTION]), self.encode([QUESTION, ANSWER]).ids
        except DataError:
            return False  # a template that wants more than that
        return bool(self._header) and whole[: len(prompt)] != prompt

    def end_ids(self) -> frozenset[int]:
        """The special tokens that an answer ends with; none where the template ends it with plain text."""
        try:
            encoded = self.encode([QUESTION, ANSWER])
        except DataError:
            return frozenset()  # a template that wants more than that
        spoken = [token for tokens in encoded.spoken.values() for token, own in zip(encoded.ids, tokens, strict=True) if own]
        special = {self.tokenizer.id_of(text) for text in self.tokenizer.special_texts}
        return frozenset(token for token in spoken[-2:] if token in special)

    def _render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool, marks: str) -> str:
        """The rendering, with ``marks`` around what generation tags enclose."""
        given = [_name_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages]
        self._environment.globals[MARKS] = [*marks]
        self._environment.start()
        try:
            text = self._template.render(
                messages=given, add_generation_prompt=add_generation_prompt, tools=tools, documents=None, **self.tokenizer.special
            )
            text.encode()  # half of a surrogate pair, which a template may write, is nothing that a tokenizer reads
            return text
        except Exception as error:  # a template is a program, and may fail in any way that programs do
            raise DataError(f"{self.name}: the chat template refuses the conversation: {error or type(error).__name__}") from None

    def _choose_break(self, messages: list[Message], tools: list[Any] | None) -> str:
        """A mark to break the special tokens with that a conversation spells out; "" where there is none."""
        has_special = any(self.tokenizer.find_special(text) for text in _texts_of([messages, tools]))
        return _choose_marks([messages, tools], 1) if has_special else ""

    def _break_special(self, value: Any, mark: str) -> Any:
        """Messages or tools with a mark inside each special token that they spell out, so that it is none."""

        def break_text(text: str) -> str:
            for start, _ in reversed(self.tokenizer.find_special(text)):
                text = text[: start + 1] + mark + text[start + 1 :]
            return text

        return _map_texts(value, break_text)

    def _encode_broken(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        """Ids of a rendering whose conversation was broken by a mark, and the characters of the rendering that each came from."""
        places = [match.start() for match in re.finditer(re.escape(mark), text)]
        special = [tuple(place - bisect.bisect_left(places, place) for place in span) for span in self.tokenizer.find_special(text)]
        encoded = self.tokenizer.encode(text.replace(mark, ""), add_special_tokens=False, special=cast(list[Span], special))
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        whole = np.delete(np.arange(len(text)), places)  # character without marks → character of the rendering
        return encoded.ids, np.stack([whole[offsets[:, 0]], whole[np.maximum(offsets[:, 1] - 1, 0)] + (offsets[:, 1] > offsets[:, 0])], axis=1)

    def _find_spans(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The rendered text and the [start, end) characters of every answer, its end-of-turn token included."""
        if self._has_generation_tags:
            marks = _choose_marks([messages, tools], 2)
            return _cut_marks(self._render(messages, tools, False, marks), marks)
        text = self.render(messages, tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for find in (self._spans_by_markers, self._spans_by_prefixes, self._spans_by_headers):
            spans = find(messages, tools, answers, text)
            if spans is not None:
                return text, spans
        raise DataError(
            f"{self.name}: the chat template does not show where the assistant speaks: "
            "give it {% generation %} tags, or name another with dataset.chat_template"
        )

    def _tags_each_answer(self, messages: list[Message], tools: list[Any] | None, answers: list[int]) -> bool:
        """Whether each answer adds one span of the template's tags; other ways to find answers do so anyway."""
        if not self._has_generation_tags or len(answers) == 1:
            return True
        marks = _choose_marks([messages, tools], 2)
        try:
            counts = [len(_cut_marks(self._render(messages[: index + 1], tools, False, marks), marks)[1]) for index in answers]
        except DataError:
            return False  # a template that refuses a part of a conversation
        return counts == list(range(1, len(answers) + 1))

    def _spans_by_markers(self, messages: list[Message], tools: list[Any] | None, answers: list[int], text: str) -> list[Span] | None:
        marks = _choose_marks([messages, tools], 2)
        begin, end = marks[0], marks[1]
        # Of an answer only the text: where the template shows more of it, what is rebuilt is not the rendering.
        marked = [
            {"role": message["role"], "content": f"{begin}{index}{end}"} if index in answers else message for index, message in enumerate(messages)
        ]
        try:
            pieces = re.split(f"{begin}([0-9]+){end}", self._render(marked, tools, False, marks))
        except DataError:
            return None  # a template that looks into answers
        if pieces[1::2] != list(map(str, answers)):
            return None
        contents = [messages[index]["content"] for index in answers]
        for candidate in (contents, [content.strip() for content in contents]):
            rebuilt, spans = pieces[0], []
            for content, before, after in zip(candidate, pieces[:-1:2], pieces[2::2], strict=True):
                spans.append((len(rebuilt) - self._length_after_header(before), len(rebuilt) + len(content)))
                rebuilt += content + after
            if rebuilt == text:
                return [self._with_end_of_turn(text, span) for span in spans]
        return None

    def _spans_by_prefixes(self, messages: list[Message], tools: list[Any] | None, answers: list[int], text: str) -> list[Span] | None:
        spans = []
        for index in answers:
            try:
                before = self.render(messages[:index], tools, add_generation_prompt=True)
                through = self.render(messages[: index + 1], tools)
            except DataError:
                return None  # a template that refuses a part of a conversation
            if not (text.startswith(through) and through.startswith(before)) or (through == before and messages[index]["content"]):
                return None
            ends = [end for _, end in self.tokenizer.find_special(through) if end > len(before)]
            spans.append((len(before), ends[-1] if ends else len(through)))
        return spans

    def _spans_by_headers(self, messages: list[Message], tools: list[Any] | None, answers: list[int], text: str) -> list[Span] | None:
        starts = [match.end() for match in re.finditer(re.escape(self._header), text)] if self._header else []
        if len(starts) != len(answers):
            return None
        spans = []
        for start, limit in zip(starts, [*starts[1:], len(text)], strict=True):
            answer = text[start:limit]
            stops = [end for begin, end in self.tokenizer.find_special(answer) if answer[begin:end] in self._stops]
            if not stops:
                return None
            spans.append((start, start + stops[0]))
        return spans

    @functools.cached_property
    def _header(self) -> str:
        """The generation prompt, where answers begin with it; else ""."""
        try:
            before, prompt = (self.render([QUESTION], add_generation_prompt=asks) for asks in (False, True))
            text = self.render([QUESTION, ANSWER])
        except DataError:
            return ""  # a template that wants more than that
        return prompt.removeprefix(before) if text.startswith(prompt) and prompt.startswith(before) else ""

    def _length_after_header(self, text: str) -> int:
        """How many characters follow the last generation prompt in a text; 0 where it has none."""
        place = text.rfind(self._header) if self._header else -1
        return len(text) - place - len(self._header) if place >= 0 else 0

    @functools.cached_property
    def _stops(self) -> frozenset[str]:
        """Special tokens that end an answer: the tokenizer's, and the one that the template puts after a plain answer."""
        stops = {token for token in self.tokenizer.special_texts if self.tokenizer.id_of(token) in self.tokenizer.stop_ids}
        try:
            text = self.render([QUESTION, ANSWER])
        except DataError:
            return frozenset(stops)  # a template that wants more than that
        for start, end in self._spans_by_markers([QUESTION, ANSWER], None, [1], text) or []:
            stops |= {text[start:end][first:last] for first, last in self.tokenizer.find_special(text[start:end])}
        return frozenset(stops)

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        """The span, up to the end of the special token that follows it directly or after white space; bos begins the next turn."""
        start, end = span
        after = end + len(text[end:]) - len(text[end:].lstrip())
        bos, eos = (self.tokenizer.special.get(name) for name in ("bos_token", "eos_token"))
        for token in self.tokenizer.special_texts:
            if text.startswith(token, after) and (token != bos or token == eos):
                return start, after + len(token)
        return start, end


def find_template(tokenizer: Tokenizer, choice: str, says: str = "dataset.chat_template") -> ChatTemplate | None:
    """The template that a setting chooses, the tokenizer's own by default; None where there is none.

    Args:
        says: the setting, for messages.

    Raises:
        DataError: no template of that name, or one that cannot be read.
    """
    if choice == NO_TEMPLATE:
        return None
    if choice.endswith(".jinja"):
        try:
            return ChatTemplate(tokenizer, choice, Path(choice).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{says} = {choice!r} cannot be read: {error}") from None
    if choice:
        if choice not in NAMED_TEMPLATES:
            names = (*NAMED_TEMPLATES, NO_TEMPLATE)
            near = difflib.get_close_matches(choice.lower(), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{says} = {choice!r} is neither a named template ({', '.join(names)}) nor a .jinja file{hint}")
        return ChatTemplate(tokenizer, choice, NAMED_TEMPLATES[choice])
    return ChatTemplate(tokenizer, str(tokenizer.folder), tokenizer.chat_template) if tokenizer.chat_template is not None else None


def complete_tokens(tokenizer: Tokenizer, template: ChatTemplate, resize_embeddings: bool) -> tuple[Tokenizer, ChatTemplate]:
    """The tokenizer with every special token that the template writes, added where that was asked for.

    Raises:
        DataError: the tokenizer lacks some.
    """
    missing = template.find_missing_tokens()
    if missing and not resize_embeddings:
        raise DataError(
            f"the chat template {template.name} writes {', '.join(missing)}, which are no tokens of the tokenizer in {tokenizer.folder}: "
            "name another with dataset.chat_template, or set model.resize_embeddings = true, which adds them to the tokenizer and the model"
        )
    if not missing:
        return tokenizer, template
    completed = tokenizer.with_tokens(missing)
    return completed, ChatTemplate(completed, template.name, template.source)


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
        begin, end = cast(list[str], self.environment.globals[MARKS])
        return f"{begin}{caller()}{end}"


def _texts_of(value: Any) -> list[str]:
    """Every text inside messages or tools, their keys among them."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in _texts_of(part)]
    if isinstance(value, list):
        return [text for item in value for text in _texts_of(item)]
    return [value] if isinstance(value, str) else []


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same messages or tools with every text in them changed."""
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _name_reasoning(message: Message) -> Message:
    """A message with what the assistant thinks under every name that templates have for it."""
    thought = next((message[name] for name in REASONING if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _choose_marks(conversation: Any, count: int) -> str:
    """Characters that do not occur in a conversation."""
    used = set(json.dumps(conversation, ensure_ascii=False, default=str))
    return "".join([mark for mark in map(chr, range(FIRST_MARK, FIRST_MARK + len(used) + count)) if mark not in used][:count])


def _cut_marks(marked: str, marks: str) -> tuple[str, list[Span]]:
    """A rendering without its marks, and what they enclosed."""
    begin, end = marks[0], marks[1]
    text, spans, start = "", [], 0
    for piece in re.split(f"([{begin}{end}])", marked):
        if piece == begin:
            start = len(text)
        elif piece == end:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
