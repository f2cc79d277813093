"""Documents are cut where a row ends, written while they are read, and a long text's parts join to the tokens of the whole."""

import hashlib
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOKENIZER, WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.samples import open_tokenizer

import tunelib.data.readers as readers
from tunelib.config.schema import Columns, Dataset
from tunelib.data.build import BYTES_PER_TASK, COLUMNS, ROWS_PER_TASK, Builder, Facts, build_source, estimate_bytes, plan_tasks
from tunelib.data.encode import ALL_TRAINED, DOUBLE_BOS, NO_STOP, SPECIAL_TEXT, Reading, read_ids, read_trained
from tunelib.data.readers import RawRow
from tunelib.data.sources import OpenedSource, open_source
from tunelib.data.tokenizer import Tokenizer
from tunelib.data.workers import Rows, digest_tokens
from tunelib.errors import DataError

SOURCE = OpenedSource("data.txt", ("data.txt",), digest="", size_bytes=0, notes=())


def new_builder(seq_len: int, too_long: str) -> Builder:
    return Builder(io.BytesIO(), SOURCE, seq_len, too_long, Facts("text"))


def documents_of(builder: Builder) -> list[tuple[list[int], int, int]]:
    """(marked tokens, trained labels, line) of each document."""
    assert isinstance(builder.file, io.BytesIO)
    tokens = np.frombuffer(builder.file.getvalue(), dtype=np.int32)
    assert builder.num_tokens == len(tokens)
    found = []
    for row in np.array(builder.documents).reshape(-1, len(COLUMNS)).tolist():
        start, length, num_trained, file, line, _ = row
        assert file == 0
        found.append((tokens[start : start + length + 1].tolist(), num_trained, line))
    return found


def expected_documents(marked: list[int], seq_len: int, too_long: str) -> list[tuple[list[int], int]]:
    """What the law says: pieces of at most seq_len + 1 tokens that overlap by one, those without a trained label left out."""
    length = len(marked) - 1
    if length > seq_len and too_long == "drop":
        return []
    ends = range(0, length, seq_len) if too_long == "split" else range(min(1, length))
    pieces = [marked[first : first + seq_len + 1] for first in ends]
    return [(piece, sum(token >= 0 for token in piece[1:])) for piece in pieces if any(token >= 0 for token in piece[1:])]


@pytest.mark.parametrize("too_long", ["split", "truncate", "drop"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 10, 15, 16, 17])
def test_document_of_each_length_near_a_border_is_cut_as_the_law_says(num_tokens: int, too_long: str) -> None:
    builder = new_builder(8, too_long)
    marked = list(range(10, 10 + num_tokens))
    for line in (4, 5):
        builder.add(np.array(marked, dtype=np.int32), np.full(num_tokens, line), 0, line)
    expected = [(*document, line) for line in (4, 5) for document in expected_documents(marked, 8, too_long)]
    assert documents_of(builder) == expected
    assert builder.facts.num_read == 2
    assert builder.facts.num_long == 2 * (num_tokens > 9)
    assert builder.facts.num_untrained == 2 * (num_tokens < 2)
    assert set(builder.facts.examples.values()) <= {(0, 4)}  # of the first, also where it has no token


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30), max_size=5),
    st.integers(1, 9),
    st.sampled_from(["split", "truncate", "drop"]),
    st.integers(1, 7),
)
@settings(deadline=None)
def test_documents_do_not_depend_on_the_parts_they_come_in(texts: list[list[tuple[int, bool]]], seq_len: int, too_long: str, part: int) -> None:
    builder, expected, line = new_builder(seq_len, too_long), [], 1
    for text in texts:
        marked = [token if trained else ~token for token, trained in text]
        lines = np.arange(line, line + len(marked))  # a line for each token, so that a wrong one shows
        firsts = list(range(0, len(marked), part)) or [0]
        for first in firsts:
            piece = slice(first, first + part)
            builder.add(np.array(marked[piece], dtype=np.int32), lines[piece], 0, line + first, 0, is_last=first == firsts[-1])
        pieces = expected_documents(marked, seq_len, too_long)
        expected += [document for document, _ in pieces]
        line += len(marked) + 1
    found = documents_of(builder)
    assert [document for document, _, _ in found] == expected
    assert builder.facts.num_read == len(texts)
    digests = np.array(builder.documents).reshape(-1, len(COLUMNS))[:, -1].tolist()
    ids = [tuple(read_ids(np.array(document)).tolist()) for document in expected]
    assert all((ids[a] == ids[b]) == (digests[a] == digests[b]) for a in range(len(ids)) for b in range(a))
    assert builder.digest.hexdigest() == hashlib.blake2b(builder.file.getvalue(), digest_size=16).hexdigest()  # type: ignore[attr-defined]


def test_every_token_but_the_first_is_a_label_once_in_the_pieces_of_a_long_document() -> None:
    builder = new_builder(7, "split")
    builder.add(np.arange(100, dtype=np.int32), np.arange(100) // 10 + 1, 0, 1)
    pieces = documents_of(builder)
    assert [label for marked, _, _ in pieces for label in marked[1:]] == list(range(1, 100))
    assert [line for *_, line in pieces] == [first // 10 + 1 for first in range(0, 99, 7)]
    assert builder.num_tokens == 100  # the shared token is stored once


def digests_of(builder: Builder) -> list[int]:
    return np.array(builder.documents).reshape(-1, len(COLUMNS))[:, -1].tolist()


def test_pieces_of_a_document_share_its_digest_and_those_of_a_text_in_parts_have_their_own() -> None:
    marked, lines = np.arange(20, dtype=np.int32), np.full(20, 1)
    whole = digest_tokens(marked)
    rows = new_builder(7, "split")
    rows.add(marked, lines, 0, 1, digest=whole)
    assert digests_of(rows) == [whole] * 3
    text = new_builder(7, "split")
    text.add(marked[:10], lines[:10], 0, 1, is_last=False)
    text.add(marked[10:], lines[10:], 0, 1)
    assert digests_of(text) == [digest_tokens(marked[first : first + 8]) for first in (0, 7, 14)]


def test_documents_that_are_equal_once_they_are_cut_have_one_digest() -> None:
    builder = new_builder(7, "truncate")
    for length in (8, 9, 12, 7):
        marked = np.arange(length, dtype=np.int32)
        builder.add(marked, np.full(length, 1), 0, 1, digest=digest_tokens(marked))
    digests = digests_of(builder)
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'{"text": "abc"}', 15),
        ({"text": "x" * 1000, "other": None, "flag": True}, 1016),
        ({"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y" * 500}]}, 1013),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 500}]}]}, 508),
        ({"input_ids": [5] * 1000, "labels": []}, 8000),
    ],
)
def test_size_of_a_row_is_about_that_of_what_it_holds(row: bytes | dict[str, Any], expected: int) -> None:
    assert estimate_bytes(row) == pytest.approx(expected, abs=16)


def test_row_nested_without_end_is_sized_in_no_time() -> None:
    row: Any = "x"
    for _ in range(100_000):
        row = [row]
    assert estimate_bytes({"odd": row}) == 0


@given(st.lists(st.integers(0, 4).map(lambda power: 30**power), min_size=1, max_size=600), st.booleans())
@settings(deadline=None, max_examples=30)
def test_tasks_stay_near_their_size_and_hold_all_rows_in_order(sizes: list[int], is_read: bool) -> None:
    text = "x" * max(sizes)
    contents: list[Any] = [{"text": text[:size]} if is_read else text[:size].encode() for size in sizes]
    tasks = list(plan_tasks(SOURCE, (RawRow(0, line, content) for line, content in enumerate(contents, start=1))))
    assert all(isinstance(task, Rows) for task in tasks)
    assert [content for task in tasks for content in task.contents] == contents  # type: ignore[union-attr]
    ends = np.cumsum([len(task.lines) for task in tasks])  # type: ignore[union-attr]
    for first, end in zip([0, *ends], ends, strict=False):
        assert end - first <= ROWS_PER_TASK
        assert sum(sizes[first : end - 1]) < BYTES_PER_TASK  # without its last row it is below, so that one row more was taken


def test_rows_of_parquet_with_large_texts_make_small_tasks(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["word " * 80_000] * 20}), tmp_path / "a.parquet")
    source = open_source(Dataset(path=str(tmp_path / "a.parquet")), tmp_path / "cache")
    assert [len(task.lines) for task in plan_tasks(source, source.rows()) if isinstance(task, Rows)] == [1] * 20


def grow(path: Path) -> None:
    with open(path, "a") as file:
        file.write('{"text": "more"}\n')


def write_over(path: Path) -> None:
    """As long as before, and the time set back."""
    before = path.stat()
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


@pytest.mark.parametrize("num_bytes", [10, 2 << 20])
@pytest.mark.parametrize("change", [grow, write_over, replace_by_copy, Path.unlink])
def test_file_that_changed_between_its_digest_and_the_end_of_its_reading_is_refused(tmp_path: Path, change: Any, num_bytes: int) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n' + " " * num_bytes + "\n")
    for _ in range(2):  # the second time with a memo of the digest
        source = open_source(Dataset(path=str(tmp_path / "*.jsonl")), tmp_path / "cache")
        list(source.rows())
        source.check_unchanged()
    change(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=rf"^{tmp_path}/b\.jsonl changed while it was read; start again when it is complete$"):
        source.check_unchanged()


def test_too_long_is_an_error_as_soon_as_it_is_seen_and_names_the_line_where_the_document_begins() -> None:
    builder = new_builder(8, "error")
    builder.add(np.arange(9, dtype=np.int32), np.full(9, 2), 0, 2)
    builder.add(np.arange(5, dtype=np.int32), np.full(5, 30), 0, 30, is_last=False)
    with pytest.raises(DataError, match=r"^data\.txt:30: more than 9 tokens do not fit training\.seq_len = 8; see dataset\.too_long$"):
        builder.add(np.arange(5, dtype=np.int32), np.full(5, 31), 0, 31, is_last=False)
    with pytest.raises(DataError, match=r"^data\.txt:40: 11 tokens do not fit"):
        new_builder(8, "error").add(np.arange(11, dtype=np.int32), np.full(11, 40), 0, 40)


def test_remarks_of_a_document_are_counted_once_however_many_parts_have_them() -> None:
    builder = new_builder(8, "split")
    for is_last in (False, False, True):
        builder.add(np.arange(4, dtype=np.int32), np.full(4, 1), 0, 1, SPECIAL_TEXT | DOUBLE_BOS, is_last)
    builder.add(np.arange(4, dtype=np.int32), np.full(4, 5), 0, 5, NO_STOP | ALL_TRAINED | SPECIAL_TEXT)
    facts = builder.facts
    assert (facts.num_special_text, facts.num_double_bos, facts.num_no_stop, facts.num_all_trained) == (2, 1, 1, 1)
    assert facts.examples["special_text"] == (0, 1)
    assert facts.examples["no_stop"] == (0, 5)
    assert facts.examples["long"] == (0, 1)


def write_text(path: Path, num_chars: int, seed: int = 0) -> str:
    """A text with what tokenizers treat in their own ways: numbers, indentation, blank lines, long words, accents, emoji, special tokens."""
    chance = random.Random(seed)
    odd = ["naïve", "Ωμέγα", "日本語", "🙂🙃", "1234567", "don't", "x" * 60, "\t\tdef f():", "    ", "<|im_end|>", "a\u0301", "—", "\n\n\n"]
    words = chance.choices([*odd, *WORDS], [1] * len(odd) + [9] * len(WORDS), k=num_chars // 7)
    gaps = chance.choices([" ", "\n", ", ", ". ", "\n    "], [80, 4, 8, 6, 2], k=len(words))
    text = "".join(piece for pair in zip(words, gaps, strict=True) for piece in pair)
    path.write_text(text, encoding="utf-8")
    return text


def build_text(folder: Path, path: Path, tokenizer: Tokenizer, seq_len: int, num_workers: int, **reading: bool) -> tuple[np.ndarray, np.ndarray]:
    """The marked tokens and the columns of the index of a text file."""
    folder.mkdir()
    source = open_source(Dataset(path=str(path)), folder / "cache")
    how = Reading(tokenizer, None, "text", Columns(), "assistant", reading.get("parse_special_tokens", False), 10**6)
    build_source(folder, source, how, seq_len, "split", num_workers)
    return np.fromfile(folder / "tokens.bin", dtype=np.int32), np.load(folder / "documents.npy")


def check_parts_join(folder: Path, text: str, tokenizer: Tokenizer, num_workers: int, seq_len: int) -> None:
    marked, columns = build_text(folder / f"index{num_workers}", folder / "book.txt", tokenizer, seq_len, num_workers)
    whole = tokenizer.encode_document(text)
    assert read_trained(marked).all()
    assert np.array_equal(marked, whole.ids)
    starts, lengths, _, _, lines, _ = columns
    assert np.array_equal(starts, np.arange(0, len(whole.ids) - 1, seq_len))
    assert lengths.sum() == len(whole.ids) - 1
    breaks = np.flatnonzero(np.array(list(text)) == "\n")
    assert np.array_equal(lines, 1 + np.searchsorted(breaks, [whole.offsets[start][0] for start in starts]))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("part_chars", [1500, 9973])
def test_parts_of_a_text_join_to_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_chars: int, num_workers: int) -> None:
    monkeypatch.setattr(readers, "TEXT_PART_CHARS", part_chars)
    text = write_text(tmp_path / "book.txt", 60_000)
    check_parts_join(tmp_path, text, Tokenizer(TOKENIZER), num_workers, seq_len=50)
    facts = (tmp_path / f"index{num_workers}" / "facts.json").read_text()
    assert '"num_seams": 0' in facts
    assert '"num_special_text": 1' in facts


@pytest.mark.parametrize("num_workers", [1, 2])
def test_long_text_has_the_tokens_of_the_whole_with_the_real_tokenizer(tmp_path: Path, smollm2: Path, num_workers: int) -> None:
    text = write_text(tmp_path / "book.txt", 2_300_000)
    assert len(text) > 2 * readers.TEXT_PART_CHARS
    check_parts_join(tmp_path, text, Tokenizer(smollm2), num_workers, seq_len=2048)
    assert '"num_seams": 0' in (tmp_path / f"index{num_workers}" / "facts.json").read_text()


@pytest.mark.parametrize("part_chars", [40, 1000])
def test_text_has_one_begin_and_one_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_chars: int) -> None:
    monkeypatch.setattr(readers, "TEXT_PART_CHARS", part_chars)
    tokenizer = open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], eos_token="</s>")
    (tmp_path / "book.txt").write_text("one line of twenty..\n" * 8 + "</s>")
    plain, _ = build_text(tmp_path / "plain", tmp_path / "book.txt", tokenizer, 1000, 1)
    assert plain.tolist().count(1) == 1  # what the text spells is no token
    parsed, _ = build_text(tmp_path / "parsed", tmp_path / "book.txt", tokenizer, 1000, 1, parse_special_tokens=True)
    assert parsed.tolist().count(1) == 1  # the text has ended already
    assert plain[-1] == parsed[-1] == 1
    assert len(plain) == len(parsed) + len("</s>")


def test_each_text_of_a_folder_is_a_document_of_its_own(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], eos_token="</s>")
    (tmp_path / "texts").mkdir()
    texts = ["first\n", "second", "third\n\n"]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "texts" / "1b.md").write_text("")  # an empty file is no document
    marked, columns = build_text(tmp_path / "index", tmp_path / "texts", tokenizer, 100, 1)
    assert marked.tolist() == [token for text in texts for token in tokenizer.encode_document(text).ids]
    assert columns[3].tolist() == [0, 1, 3]
