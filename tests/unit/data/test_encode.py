"""Rows become token ids with a mark on what is trained; parts of a long text become the tokens of the whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.samples import DEBUG_TOKENIZER, open_tokenizer

from tunelib.config.schema import Columns
from tunelib.data.chat import CHATML, LLAMA3
from tunelib.data.encode import ALL_TRAINED, DOUBLE_BOS, NO_STOP, SPECIAL_TEXT, Encoder, Reading, read_ids, read_trained
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

WHERE = "rows.jsonl:7"
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SYSTEM, ASK, SAY = ({"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "a")))
MORE, ANSWER = {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}
# Marks answers by its own tags, but not each by itself.
TAGGED_TWICE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, and <s> the beginning, </s> the end."""
    return open_tokenizer(tmp_path_factory.mktemp("tokenizer"), SPECIALS, bos_token="<s>", eos_token="</s>")


def make_encoder(tokenizer: Tokenizer, format: str = "chat", template: str | None = CHATML, **changes: Any) -> Encoder:
    named = None if template is None else ("mine", template)
    reading = Reading(tokenizer, named, format, Columns(), "assistant", parse_special_tokens=False, vocab_size=300)
    return Encoder(replace(reading, **changes))


def parts_of(encoder: Encoder, row: dict[str, Any]) -> str:
    """The document with [ ] around what is trained."""
    marked = encoder.encode(row, WHERE).marked
    assert marked.dtype == np.int32
    text, is_trained = "", False
    for token, mark in [*zip(read_ids(marked).tolist(), read_trained(marked).tolist(), strict=True), (None, False)]:
        text += "[" * (mark and not is_trained) + "]" * (is_trained and not mark)
        text += "" if token is None else encoder.tokenizer.decode([token], skip_special_tokens=False)
        is_trained = mark
    return text


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


TWO_TURNS = chat(ASK, SAY, MORE, ANSWER)
Q, R = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
TRAINED: dict[str, tuple[str, dict[str, Any], str]] = {
    "assistant": ("assistant", TWO_TURNS, f"{Q}[a<|im_end|>]{R}[b<|im_end|>]\n"),
    "last": ("last", TWO_TURNS, f"{Q}a<|im_end|>{R}[b<|im_end|>]\n"),
    "all": ("all", TWO_TURNS, f"[{Q}a<|im_end|>{R}b<|im_end|>\n]"),
    "assistant, one flagged out": ("assistant", chat(ASK, SAY, MORE, {**ANSWER, "weight": 0}), f"{Q}[a<|im_end|>]{R}b<|im_end|>\n"),
    "assistant, questions flagged out": ("assistant", chat({**ASK, "train": False}, SAY), f"{Q}[a<|im_end|>]\n"),
    "last, the first flagged in": ("last", chat(ASK, {**SAY, "train": True}, MORE, ANSWER), f"{Q}[a<|im_end|>]{R}[b<|im_end|>]\n"),
    "last, flagged out": ("last", chat(ASK, SAY, MORE, {**ANSWER, "train": False}), f"{Q}a<|im_end|>{R}b<|im_end|>\n"),
    "all, one flagged out": ("all", chat(ASK, {**SAY, "weight": 0}, MORE, ANSWER), f"[{Q}]a<|im_end|>[{R}b<|im_end|>\n]"),
}


@pytest.mark.parametrize(("train_on", "row", "expected"), TRAINED.values(), ids=TRAINED)
def test_trained_is_what_train_on_and_the_flags_say(tokenizer: Tokenizer, train_on: str, row: dict[str, Any], expected: str) -> None:
    assert parts_of(make_encoder(tokenizer, train_on=train_on), row) == expected


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", f"{Q}a<|im_end|>{R}[b<|im_end|>]\n"),
        ("last", f"{Q}a<|im_end|>{R}[b<|im_end|>]\n"),
        ("all", f"[{Q}a<|im_end|>{R}b<|im_end|>\n]"),
    ],
)
def test_answers_in_a_prompt_are_trained_with_all_only(tokenizer: Tokenizer, train_on: str, expected: str) -> None:
    encoder = make_encoder(tokenizer, "prompt_completion", train_on=train_on)
    assert parts_of(encoder, {"prompt": [ASK, SAY, MORE], "completion": [ANSWER]}) == expected


def test_answer_in_a_prompt_is_trained_where_it_is_flagged(tokenizer: Tokenizer) -> None:
    encoder = make_encoder(tokenizer, "prompt_completion", train_on="last")
    assert parts_of(encoder, {"prompt": [ASK, {**SAY, "train": True}, MORE], "completion": [ANSWER]}) == f"{Q}[a<|im_end|>]{R}[b<|im_end|>]\n"


def test_every_format_becomes_a_document(tokenizer: Tokenizer) -> None:
    assert parts_of(make_encoder(tokenizer, "prompt_completion"), {"prompt": "q", "completion": "a"}) == f"{Q}[a<|im_end|>]\n"
    assert parts_of(make_encoder(tokenizer, "instruct"), {"instruction": "q", "output": "a"}) == f"{Q}[a<|im_end|>]\n"
    assert parts_of(make_encoder(tokenizer, "text"), {"text": "é t"}) == parts_of(make_encoder(tokenizer, "text", None), {"text": "é t"})
    assert parts_of(make_encoder(tokenizer, "text"), {"text": "t u"}) == "[t u</s>]"
    assert parts_of(make_encoder(tokenizer, "tokens"), {"input_ids": [0, 5, 1], "labels": [-100, 5, 1]})[:4] == "<s>["


@pytest.mark.parametrize(
    ("train_on", "prompt", "completion", "expected"),
    [
        ("assistant", "q ", "a", "q [a</s>]"),
        ("last", "q", "a", "q[a</s>]"),
        ("all", "q", "a", "[qa</s>]"),
        ("assistant", "", "a", "[a</s>]"),
        ("assistant", "q", "", "q[</s>]"),
    ],
)
def test_completion_is_trained_without_a_template(tokenizer: Tokenizer, train_on: str, prompt: str, completion: str, expected: str) -> None:
    encoder = make_encoder(tokenizer, "prompt_completion", None, train_on=train_on)
    assert parts_of(encoder, {"prompt": prompt, "completion": completion}) == expected


def test_token_that_reaches_into_the_completion_is_trained() -> None:
    encoder = make_encoder(Tokenizer(DEBUG_TOKENIZER), "prompt_completion", None, vocab_size=640)
    whole = encoder.tokenizer.encode_document("say the sum")
    inside = next(end - 1 for start, end in whole.offsets if end - start > 1)
    marked = encoder.encode({"prompt": "say the sum"[:inside], "completion": "say the sum"[inside:]}, WHERE).marked
    assert read_ids(marked).tolist() == whole.ids
    assert read_trained(marked).tolist() == [end > inside for _, end in whole.offsets]


def test_special_tokens_in_the_data_are_text_unless_parsed(tokenizer: Tokenizer) -> None:
    def special_ids(format: str, template: str | None, row: dict[str, Any], parse: bool) -> tuple[list[int], int]:
        document = make_encoder(tokenizer, format, template, parse_special_tokens=parse).encode(row, WHERE)
        return [token for token in read_ids(document.marked).tolist() if token < len(SPECIALS)], document.remarks

    forged = chat({**ASK, "content": "<|im_end|>"}, SAY)
    assert special_ids("chat", CHATML, forged, False) == ([2, 3, 2, 3], SPECIAL_TEXT)
    assert special_ids("chat", CHATML, forged, True) == ([2, 3, 3, 2, 3], 0)
    assert special_ids("text", None, {"text": "a</s>b"}, False) == ([1], SPECIAL_TEXT)
    assert special_ids("text", None, {"text": "a</s>b"}, True) == ([1, 1], 0)
    assert special_ids("text", None, {"text": "<s>a</s>"}, True) == ([0, 1], 0)  # already ended
    assert special_ids("prompt_completion", None, {"prompt": "<s>a", "completion": "b</s>"}, False) == ([1], SPECIAL_TEXT)
    assert special_ids("prompt_completion", None, {"prompt": "<s>a", "completion": "b</s>"}, True) == ([0, 1], 0)


def test_remarks_tell_what_a_person_should_hear(tokenizer: Tokenizer) -> None:
    def remarks(row: dict[str, Any], format: str = "chat", template: str | None = CHATML, **changes: Any) -> int:
        return make_encoder(tokenizer, format, template, **changes).encode(row, WHERE).remarks

    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    double = "{{ bos_token }}{{ bos_token }}" + CHATML
    everything = "{% generation %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endgeneration %}"
    assert remarks(TWO_TURNS) == 0
    assert remarks(TWO_TURNS, template=plain) == NO_STOP
    assert remarks(chat(ASK, {**SAY, "weight": 0}), template=plain) == 0  # nothing is trained, so that nothing need stop
    assert remarks(TWO_TURNS, template=double) == DOUBLE_BOS
    assert remarks({"text": "<s><s>a"}, "text", None, parse_special_tokens=True) == DOUBLE_BOS
    assert remarks(TWO_TURNS, template=everything) == ALL_TRAINED
    assert remarks(TWO_TURNS, template=everything, train_on="all") == 0
    assert remarks({"input_ids": [4, 5]}, "tokens") == 0


def test_tags_that_do_not_mark_each_answer_train_all_answers_or_none(tokenizer: Tokenizer) -> None:
    encoder = make_encoder(tokenizer, template=TAGGED_TWICE)
    assert parts_of(encoder, TWO_TURNS) == "q[a<|im_end|>]r[b<|im_end|>]"
    none = chat(ASK, {**SAY, "weight": 0}, MORE, {**ANSWER, "weight": 0})
    assert parts_of(encoder, none) == "qa<|im_end|>rb<|im_end|>"
    everything = make_encoder(tokenizer, template=TAGGED_TWICE, train_on="all")
    assert parts_of(everything, TWO_TURNS) == "[qa<|im_end|>rb<|im_end|>]"
    assert parts_of(everything, none) == "[q]a<|im_end|>[r]b<|im_end|>"
    last = make_encoder(tokenizer, template=TAGGED_TWICE, train_on="last")
    with pytest.raises(DataError, match=f"^{WHERE}: the chat template's generation tags do not mark each answer by itself, so none can be left out$"):
        last.encode(TWO_TURNS, WHERE)


ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not of the format": (
        {},
        {"text": "t"},
        "no column 'messages' among ['text'], though the data is read as 'chat'; dataset.columns names other columns, "
        "and rows of another format are a source of their own with [[dataset.mix]]",
    ),
    "refused by the template": (
        {"template": "{{ raise_exception('no tools') }}"},
        TWO_TURNS,
        "mine: the chat template refuses the conversation: no tools",
    ),
    "answers not shown by the template": (
        {"template": "{{ messages[0].content }}"},
        TWO_TURNS,
        "mine: the chat template does not show where the assistant speaks: give it {% generation %} tags, or name another with dataset.chat_template",
    ),
    "a question flagged out of all": (
        {"train_on": "all"},
        chat({**ASK, "weight": 0}, SAY),
        'message 0 is flagged not to be trained, which dataset.train_on = "all" can do for answers only',
    ),
    "beyond the vocabulary": (
        {"vocab_size": 100},
        TWO_TURNS,
        "there is a token with the id 202, but the model's vocabulary ends at 99: "
        "model.tokenizer_path is not the model's own, or model.vocab_size is too small",
    ),
    "ids beyond the vocabulary": (
        {"format": "tokens"},
        {"input_ids": [5, 300]},
        "there is a token with the id 300, but the model's vocabulary ends at 299: "
        "model.tokenizer_path is not the model's own, or model.vocab_size is too small",
    ),
    "a negative id": ({"format": "tokens"}, {"input_ids": [5, -1]}, "-1 is no token id; ids are not negative"),
    "an id past all numbers": (
        {"format": "tokens"},
        {"input_ids": [5, 2**70]},
        "1180591620717411303424 is no token id; no vocabulary is that large",
    ),
}


@pytest.mark.parametrize(("changes", "row", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_row_is_named_with_file_and_line(tokenizer: Tokenizer, changes: dict[str, Any], row: dict[str, Any], message: str) -> None:
    encoder = make_encoder(tokenizer, **changes)
    with pytest.raises(DataError) as caught:
        encoder.encode(row, WHERE)
    assert str(caught.value) == f"{WHERE}: {message}"


def test_marked_array_holds_ids_and_marks() -> None:
    marked = np.array([5, ~0, 0, ~7], dtype=np.int32)
    assert read_ids(marked).tolist() == [5, 0, 0, 7]
    assert read_trained(marked).tolist() == [True, False, True, False]


LINES = st.lists(st.sampled_from(["amber ", "naïve\n", "🙂", "\n\n", "  if x:\n", "<|im_end|>", "tulip", " 日本", "\r\n"]), max_size=60).map("".join)


@given(LINES, st.integers(4, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_parts_of_a_text_are_the_tokens_of_the_whole(text: str, part_chars: int, parse: bool) -> None:
    encoder = make_encoder(DEBUG, "text", None, vocab_size=640, parse_special_tokens=parse)
    whole = encoder.tokenizer.encode(text, add_special_tokens=False, special=None if parse else ())
    starts = range(0, len(text), part_chars)
    parts = [
        encoder.encode_part(text[:start], text[start : start + part_chars], text[start + part_chars :], 1 + text[:start].count("\n"), WHERE)
        for start in starts
    ]
    assert [token for part in parts for token in part.ids.tolist()] == whole.ids
    assert [line for part in parts for line in part.lines.tolist()] == [1 + text[:start].count("\n") for start, _ in whole.offsets]
    # each part begins where the token before it ended
    edge = 0
    for start, part in zip(starts, parts, strict=True):
        if len(part.ids) and not DEBUG.find_special(text):
            assert part.first_start == edge
            edge = part.last_end
        elif len(text[start:]) > part_chars:
            edge -= part_chars
        assert part.has_special_text == (not parse and bool(DEBUG.find_special(text[start : start + part_chars])))


DEBUG = Tokenizer(DEBUG_TOKENIZER)


def test_part_with_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    encoder = make_encoder(open_tokenizer(tmp_path, SPECIALS), "text", None, vocab_size=100)
    with pytest.raises(DataError, match=f"^{WHERE}: there is a token with the id [0-9]+, but the model's vocabulary ends at 99"):
        encoder.encode_part("", "é", "", 7, WHERE)


def test_template_of_another_model_is_read_with_the_tokens_added() -> None:
    added = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    encoder = make_encoder(DEBUG.with_tokens(added), template=LLAMA3, vocab_size=644)
    marked = encoder.encode(chat(ASK, SAY), WHERE).marked
    assert [token for token in read_ids(marked).tolist() if token >= 640] == [641, 642, 643, 641, 642, 643]
    assert read_trained(marked).sum() == 2
