"""Every token but a document's first is a label once; what is cut, left out or held out is counted, and decided by content."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.samples import make_index, open_tokenizer

import tunelib.data.chat as chat
from tunelib.config.schema import Columns, Dataset
from tunelib.data.chat import CHATML
from tunelib.data.index import Index, build_index, split_held_out
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A token per byte; eos has the id 1."""
    return open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="</s>")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def index_texts(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], seq_len: int, too_long: str = "auto") -> Index:
    path = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    return build_index(path, Dataset(too_long=too_long), seq_len, tokenizer, 1000)  # type: ignore[arg-type]  # too_long is a Literal


def labels_of(index: Index) -> list[list[int]]:
    """The trained labels of each document."""
    spans = [(start + 1, start + 1 + length) for start, length in zip(index.starts, index.lengths, strict=True)]
    return [index.tokens[first:last][index.trained[first:last]].tolist() for first, last in spans]


def inputs_of(index: Index) -> list[list[int]]:
    return [index.tokens[start : start + length].tolist() for start, length in zip(index.starts, index.lengths, strict=True)]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 8, 100])
def test_split_makes_every_token_but_the_first_a_label_once(tmp_path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    text = "abcdefgh"
    index = index_texts(tmp_path, tokenizer, [text], seq_len, "split")
    whole = tokenizer.encode_document(text)
    assert [token for labels in labels_of(index) for token in labels] == whole[1:]
    assert [token for inputs in inputs_of(index) for token in inputs] == whole[:-1]
    assert index.lengths.max() <= seq_len
    assert index.num_trained.tolist() == [len(labels) for labels in labels_of(index)]


def test_split_is_what_text_gets_and_truncation_what_a_chat_gets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = index_texts(tmp_path, tokenizer, ["x" * 10], 4)
    assert text.lengths.tolist() == [4, 4, 2]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 50}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    assert build_index(path, Dataset(), 40, tokenizer, 1000).lengths.tolist() == [40]


def test_truncation_keeps_the_first_positions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["abcdef", "ab"], 3, "truncate")
    assert inputs_of(index) == [tokenizer.encode_document("abcdef")[:3], tokenizer.encode_document("ab")[:2]]
    assert labels_of(index)[0] == tokenizer.encode_document("abcdef")[1:4]
    assert any("1 documents cut to the first 3 tokens" in note for note in index.notes)


def test_dropping_leaves_out_long_documents_and_says_how_many(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["abcdef", "ab", "abcdefgh"], 3, "drop")
    assert (index.lengths.tolist(), index.lines.tolist()) == ([2], [2])
    assert any("2 documents left out: longer than 3 tokens" in note for note in index.notes)


def test_long_document_is_an_error_where_asked_naming_file_line_and_setting(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"training\.seq_len = 3.*dataset\.too_long") as caught:
        index_texts(tmp_path, tokenizer, ["ab", "abcdef"], 3, "error")
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:2: ")


@pytest.mark.parametrize("too_long", ["truncate", "split", "drop", "error"])
def test_document_that_just_fits_is_left_as_it_is(tmp_path: Path, tokenizer: Tokenizer, too_long: str) -> None:
    index = index_texts(tmp_path, tokenizer, ["abc"], 3, too_long)
    assert (index.lengths.tolist(), index.notes[1:]) == ([3], ())


def index_chat(tmp_path: Path, tokenizer: Tokenizer, answers: list[str], seq_len: int = 200, **section: Any) -> Index:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]} for answer in answers]
    return build_index(write_rows(tmp_path / "chat.jsonl", rows), Dataset(**section), seq_len, tokenizer, 1000)


def test_only_the_answer_is_trained_unless_all_is_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (answer,) = labels_of(index_chat(tmp_path, tokenizer, ["yes"]))
    assert tokenizer.decode(answer, skip_special_tokens=False) == "yes<|im_end|>"
    (everything,) = labels_of(index_chat(tmp_path, tokenizer, ["yes"], train_on="all"))
    assert tokenizer.decode(everything, skip_special_tokens=False) == "user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def test_document_without_a_trained_token_is_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    question = {"messages": [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a"}]}
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    index = build_index(write_rows(tmp_path / "chat.jsonl", [question, short]), Dataset(), 40, tokenizer, 1000)
    assert index.lines.tolist() == [2]
    assert any("1 documents left out: no token in them is trained" in note for note in index.notes)


def test_pieces_without_a_trained_token_are_not_counted_as_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_chat(tmp_path, tokenizer, ["a" * 60], seq_len=10, too_long="split")
    assert len(index) > 1
    assert not any("documents left out" in note for note in index.notes)


def test_data_in_which_nothing_is_trained_is_an_error_that_counts_each_document_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no token of 2 documents is trained"):
        index_chat(tmp_path, tokenizer, ["a", "b"], seq_len=5)


def test_data_of_which_all_is_too_long_is_an_error_that_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"dataset\.too_long|training\.seq_len"):
        index_texts(tmp_path, tokenizer, ["abcdef"], 3, "drop")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_file_without_a_row_is_an_error(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no document"):
        build_index(tmp_path / "data.jsonl", Dataset(), 8, tokenizer, 1000)


def test_empty_documents_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["", "ab", ""], 8)
    assert index.lines.tolist() == [2]


def test_token_outside_the_vocabulary_is_named_with_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": "a"}])
    largest = max(tokenizer.encode_document("a"))
    build_index(path, Dataset(), 8, tokenizer, largest + 1)
    with pytest.raises(DataError, match=f"gives id {largest}, but the model's vocabulary ends at {largest - 1}") as caught:
        build_index(path, Dataset(), 8, tokenizer, largest)
    assert str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    "row",
    [{"messages": 3}, {"messages": [{"role": "user", "content": "q"}]}, {"instruction": "a"}, {"messages": [{"role": "assistant", "content": None}]}],
)
def test_bad_row_is_named_with_file_and_line(tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_rows(tmp_path / "chat.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        build_index(path, Dataset(), 80, tokenizer, 1000)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_refusal_of_the_template_is_named_with_file_and_line(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path / "refusing", ["<s>"], "{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="no such role") as caught:
        index_chat(tmp_path, tokenizer, ["a"])
    assert str(caught.value).startswith(f"{tmp_path / 'chat.jsonl'}:1: ")


def test_found_format_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert any("'text'" in note for note in index_texts(tmp_path, tokenizer, ["ab"], 8).notes)


def test_fingerprint_follows_everything_that_decides_the_documents_and_not_the_file_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "abc", "words": "de"}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    other_tokenizer = open_tokenizer(tmp_path / "other", ["<x>"])

    def fingerprint(path: Path = path, seq_len: int = 8, tokenizer: Tokenizer = tokenizer, **section: Any) -> str:
        return json.dumps(build_index(path, Dataset(format="text", **section), seq_len, tokenizer, 1000).fingerprint, sort_keys=True)

    assert fingerprint(write_rows(tmp_path / "moved.jsonl", rows)) == fingerprint()
    changed = [
        fingerprint(write_rows(tmp_path / "edited.jsonl", [{"text": "abd", "words": "de"}])),
        fingerprint(seq_len=9),
        fingerprint(tokenizer=other_tokenizer),
        fingerprint(too_long="drop"),
        fingerprint(columns=Columns(text="words")),
    ]
    assert len({fingerprint(), *changed}) == len(changed) + 1


def test_fingerprint_survives_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    fingerprint = index_chat(tmp_path, tokenizer, ["a"]).fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_template_that_prints_the_date_cannot_change_the_data_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Llama 3.1's and 3.2's own templates print strftime_now("%d %b %Y")
    tokenizer = open_tokenizer(tmp_path / "dated", ["<|im_start|>", "<|im_end|>"], "{{ strftime_now('%d %b %Y') }}\n" + CHATML)

    def index_on(day: int) -> Index:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime(2026, 1, day)

        with monkeypatch.context() as patch:
            patch.setattr(chat.datetime, "datetime", Clock)
            return index_chat(tmp_path, tokenizer, ["a"])

    one, other = index_on(1), index_on(22)
    assert np.array_equal(one.tokens, other.tokens) or one.fingerprint != other.fingerprint


def test_held_out_split_is_disjoint_complete_and_the_same_every_time() -> None:
    index = make_index([1 + number % 7 for number in range(400)])
    training, held_out = split_held_out(index, 0.25)
    assert sorted([*training.lines, *held_out.lines]) == index.lines.tolist()
    assert 60 < len(held_out) < 140
    again = split_held_out(index, 0.25)
    assert np.array_equal(again[0].lines, training.lines)
    assert np.array_equal(again[1].lines, held_out.lines)


def test_held_out_documents_are_chosen_by_content_and_not_by_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number}" for number in range(60)]

    def held_out_texts(order: list[str]) -> set[str]:
        (tmp_path / "data.jsonl").unlink(missing_ok=True)
        index = index_texts(tmp_path, tokenizer, order, 64)
        return {order[line - 1] for line in split_held_out(index, 0.3)[1].lines}

    assert held_out_texts(texts) == held_out_texts(texts[::-1])
    assert held_out_texts(texts) <= held_out_texts([*texts, *(f"newcomer {number}" for number in range(20))])


def test_equal_documents_stay_on_the_same_side() -> None:
    index = make_index([3] * 40)
    index.tokens[:] = np.tile(np.repeat(np.arange(20), 4), 2)  # the second twenty are copies
    training, held_out = split_held_out(index, 0.3)
    assert {(line - 1) % 20 for line in training.lines}.isdisjoint((line - 1) % 20 for line in held_out.lines)


def test_larger_fraction_holds_out_all_that_a_smaller_one_does() -> None:
    index = make_index([2 + number % 5 for number in range(200)])
    small, large = (set(split_held_out(index, fraction)[1].lines.tolist()) for fraction in (0.1, 0.4))
    assert small < large


@pytest.mark.parametrize(("fraction", "words"), [(1e-9, "held out"), (0.999999, "to train on")])
def test_split_that_leaves_one_side_empty_is_an_error(fraction: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        split_held_out(make_index([1, 2, 3]), fraction)


def test_selection_keeps_each_documents_facts_together() -> None:
    index = make_index([3, 1, 2])
    chosen = index.select(np.array([False, True, True]))
    assert (chosen.lengths.tolist(), chosen.lines.tolist(), labels_of(chosen)) == ([1, 2], [2, 3], labels_of(index)[1:])
