"""What is trained, cut, left out or held out is decided by content and counted; an index is made once for all that decides it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_chats
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.samples import make_index, open_tokenizer

import tunelib.data.index as index_module
from tunelib.config.schema import Columns, Dataset, MixedSource
from tunelib.data.chat import CHATML
from tunelib.data.encode import read_ids, read_trained
from tunelib.data.index import Index, build_index, choose_template, find_sources, list_sources, resolve_cache_folder, split_held_out
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A token per byte; eos has the id 1."""
    return open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], CHATML, bos_token="<s>", eos_token="</s>")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_index(
    path: Path | None, tokenizer: Tokenizer, seq_len: int = 200, vocab_size: int = 1000, num_workers: int | None = None, **section: Any
) -> Index:
    """The index of a file, or of the sources of ``mix``, as a run makes it; beside the file a cache of its own."""
    section.setdefault("cache_folder", str((path.parent if path else Path(section["mix"][0].path).parent) / "cache"))
    dataset = Dataset(**({"path": str(path)} if path else {}), **section)
    found = find_sources(list_sources(dataset), resolve_cache_folder(dataset))
    template = choose_template(found, dataset, tokenizer)
    return build_index(found, dataset, seq_len, tokenizer, template, vocab_size, num_workers=num_workers)


def index_texts(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], seq_len: int, too_long: str = "auto") -> Index:
    path = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    return open_index(path, tokenizer, seq_len, too_long=too_long)


def chat(answer: str, question: str = "q") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def index_chat(tmp_path: Path, tokenizer: Tokenizer, answers: list[str], seq_len: int = 200, **section: Any) -> Index:
    return open_index(write_rows(tmp_path / "chat.jsonl", [chat(answer) for answer in answers]), tokenizer, seq_len, **section)


def labels_of(index: Index) -> list[list[int]]:
    """The trained labels of each document."""
    marked = [index.marked(document)[1:] for document in range(len(index))]
    return [read_ids(tokens)[read_trained(tokens)].tolist() for tokens in marked]


def inputs_of(index: Index) -> list[list[int]]:
    return [read_ids(index.marked(document))[:-1].tolist() for document in range(len(index))]


# Cutting. Every border is in test_build.py.


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 8, 9, 100])
def test_split_makes_every_token_but_the_first_a_label_once(tmp_path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    index = index_texts(tmp_path, tokenizer, ["abcdefgh"], seq_len, "split")
    whole = tokenizer.encode_document("abcdefgh").ids
    assert [token for labels in labels_of(index) for token in labels] == whole[1:]
    assert [token for inputs in inputs_of(index) for token in inputs] == whole[:-1]
    assert index.lengths.max() <= seq_len
    assert index.num_trained.tolist() == [len(labels) for labels in labels_of(index)]


def test_split_is_what_text_gets_and_truncation_what_a_chat_gets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert index_texts(tmp_path, tokenizer, ["x" * 10], 4).lengths.tolist() == [4, 4, 2]
    assert index_chat(tmp_path, tokenizer, ["a" * 50], 40).lengths.tolist() == [40]


def test_truncation_keeps_the_first_positions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["abcdef", "ab"], 3, "truncate")
    assert inputs_of(index) == [tokenizer.encode_document("abcdef").ids[:3], tokenizer.encode_document("ab").ids[:2]]
    assert any(f"1 documents cut to the first 3 tokens (first {tmp_path / 'data.jsonl'}:1)" in note for note in index.notes)


def test_dropping_leaves_out_long_documents_and_says_how_many(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["ab", "abcdef", "abcdefgh"], 3, "drop")
    assert (index.lengths.tolist(), index.lines.tolist()) == ([2], [1])
    assert any(f"2 documents left out: longer than 3 tokens (first {tmp_path / 'data.jsonl'}:2)" in note for note in index.notes)


def test_long_document_is_an_error_where_asked_naming_file_line_and_setting(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"training\.seq_len = 3.*dataset\.too_long") as caught:
        index_texts(tmp_path, tokenizer, ["ab", "abcdef"], 3, "error")
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:2: ")


@pytest.mark.parametrize("too_long", ["truncate", "split", "drop", "error"])
def test_document_that_just_fits_is_left_as_it_is(tmp_path: Path, tokenizer: Tokenizer, too_long: str) -> None:
    index = index_texts(tmp_path, tokenizer, ["abc"], 3, too_long)
    assert (index.lengths.tolist(), index.notes[1:]) == ([3], [])


def test_data_of_which_all_is_too_long_is_an_error_that_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"all 2 documents are longer than training\.seq_len = 3; see dataset\.too_long"):
        index_texts(tmp_path, tokenizer, ["abcdef", "abcdefgh"], 3, "drop")


# What is trained.


def test_only_the_answer_is_trained_unless_all_is_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (answer,) = labels_of(index_chat(tmp_path, tokenizer, ["yes"]))
    assert tokenizer.decode(answer, skip_special_tokens=False) == "yes<|im_end|>"
    (everything,) = labels_of(index_chat(tmp_path, tokenizer, ["yes"], train_on="all"))
    assert tokenizer.decode(everything, skip_special_tokens=False) == "user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def test_document_without_a_trained_token_is_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [chat("a", question="q" * 50), chat("a")])
    index = open_index(path, tokenizer, 40)
    assert index.lines.tolist() == [2]
    assert any(f"1 documents left out: no token in them is trained (first {path}:1)" in note for note in index.notes)


def test_pieces_without_a_trained_token_are_not_counted_as_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_chat(tmp_path, tokenizer, ["a" * 60], seq_len=10, too_long="split")
    assert len(index) > 1
    assert not any("documents left out" in note for note in index.notes)


def test_data_in_which_nothing_is_trained_is_an_error_that_counts_each_document_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no token of 2 documents is trained"):
        index_chat(tmp_path, tokenizer, ["a", "b"], seq_len=5)


def test_template_whose_tags_enclose_everything_is_an_error_unless_all_is_to_be_trained(tmp_path: Path) -> None:
    everything = "{% generation %}{% for message in messages %}{{ message.content }}</s>{% endfor %}{% endgeneration %}"
    tokenizer = open_tokenizer(tmp_path / "all", ["<s>", "</s>"], everything, eos_token="</s>")
    with pytest.raises(DataError, match=r"every token is trained, although dataset\.train_on = 'assistant'"):
        index_chat(tmp_path, tokenizer, ["a", "b"])
    assert len(index_chat(tmp_path, tokenizer, ["a", "b"], train_on="all")) == 2


def test_empty_documents_are_left_out_and_the_first_of_them_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, ["ab", "", "a", ""], 8)
    assert index.lines.tolist() == [1, 3]
    assert any(f"2 documents left out: no token in them is trained (first {tmp_path / 'data.jsonl'}:2)" in note for note in index.notes)


# Errors.


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_file_without_a_row_is_an_error(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no document"):
        open_index(tmp_path / "data.jsonl", tokenizer)


def test_empty_text_file_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(DataError, match="holds no document"):
        open_index(tmp_path / "data.txt", tokenizer)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_token_outside_the_vocabulary_is_named_with_file_and_line(tmp_path: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": "!"}, {"text": "\u00ff"}])
    largest = max(tokenizer.encode_document("\u00ff").ids)
    open_index(path, tokenizer, vocab_size=largest + 1)
    for _ in range(2):  # what was refused is not taken from the cache
        with pytest.raises(DataError, match=f"the id {largest}, but the model's vocabulary ends at {largest - 1}") as caught:
            open_index(path, tokenizer, vocab_size=largest, num_workers=num_workers)
        assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "row",
    [{"messages": 3}, {"messages": [{"role": "user", "content": "q"}]}, {"text": "a"}, {"messages": [{"role": "assistant", "content": None}]}],
)
def test_bad_row_and_row_of_another_shape_are_named_with_file_and_line(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], num_workers: int
) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [chat("a"), row, chat("b")])
    with pytest.raises(DataError) as caught:
        open_index(path, tokenizer, num_workers=num_workers)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert [entry.name for entry in (tmp_path / "cache/index").iterdir() if entry.is_dir()] == []  # nothing half-made is left


def test_refusal_of_the_template_is_named_with_file_and_line(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path / "refusing", ["<s>"], "{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="no such role") as caught:
        index_chat(tmp_path, tokenizer, ["a"])
    assert str(caught.value).startswith(f"{tmp_path / 'chat.jsonl'}:1: ")


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"columns": Columns(text="messages")}, r"dataset\.columns\.text has no effect"),
        ({"columns": Columns(prompt="other")}, r"dataset\.columns\.prompt has no effect"),
    ],
)
def test_column_that_the_format_does_not_read_is_an_error(tmp_path: Path, tokenizer: Tokenizer, section: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=name):
        index_chat(tmp_path, tokenizer, ["a"], format="chat", **section)


@pytest.mark.parametrize("section", [{"chat_template": "chatml"}, {"train_on": "last"}])
def test_setting_of_chats_is_an_error_where_there_are_none(tmp_path: Path, tokenizer: Tokenizer, section: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=rf"dataset\.{next(iter(section))} has no effect"):
        open_index(path, tokenizer, **section)


def test_parsing_of_special_tokens_is_an_error_where_no_text_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"input_ids": [3, 4, 5]}])
    with pytest.raises(DataError, match=r"dataset\.parse_special_tokens has no effect"):
        open_index(path, tokenizer, parse_special_tokens=True)


# The fingerprint and the cache.


def test_fingerprint_follows_everything_that_decides_the_documents_and_not_the_file_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "abc </s>", "words": "de"}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    other_tokenizer = open_tokenizer(tmp_path / "other", ["<x>"])

    def fingerprint(path: Path = path, seq_len: int = 8, tokenizer: Tokenizer = tokenizer, **section: Any) -> str:
        return json.dumps(open_index(path, tokenizer, seq_len, **({"format": "text"} | section)).fingerprint, sort_keys=True)

    assert fingerprint(write_rows(tmp_path / "moved.jsonl", rows)) == fingerprint()
    changed = [
        fingerprint(write_rows(tmp_path / "edited.jsonl", [{"text": "abd", "words": "de"}])),
        fingerprint(seq_len=9),
        fingerprint(tokenizer=other_tokenizer),
        fingerprint(too_long="drop"),
        fingerprint(parse_special_tokens=True),
        fingerprint(columns=Columns(text="words")),
    ]
    assert len({fingerprint(), *changed}) == len(changed) + 1


def test_fingerprint_of_chats_follows_template_and_choice_of_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sections: list[dict[str, Any]] = [{}, {"train_on": "last"}, {"train_on": "all"}, {"chat_template": "llama2"}]
    found = [json.dumps(index_chat(tmp_path, tokenizer, ["a", "b"], **section).fingerprint, sort_keys=True) for section in sections]
    assert len(set(found)) == len(sections)
    assert json.loads(found[0]) == index_chat(tmp_path, tokenizer, ["a", "b"]).fingerprint  # it survives JSON


def test_found_format_is_said_also_from_the_cache_and_only_where_it_was_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": "ab"}])
    for _ in range(2):
        assert any("read as 'text', by 'text' of its first row" in note for note in open_index(path, tokenizer).notes)
        assert open_index(path, tokenizer, format="text").notes == []
    assert len(list((tmp_path / "cache/index").glob("*/tokens.bin"))) == 1


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the index was built again")

    monkeypatch.setattr(index_module, "build_source", fail)


def test_index_is_built_once_and_read_without_the_right_to_write(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_chat(tmp_path, tokenizer, ["a", "bc"])
    forbid_building(monkeypatch)
    monkeypatch.setattr(index_module, "wait_for_lock", lambda *_: pytest.fail("a lock was taken, which needs a folder that can be written"))
    again = index_chat(tmp_path, tokenizer, ["a", "bc"])
    assert labels_of(again) == labels_of(first)
    assert again.notes == first.notes
    assert again.fingerprint == first.fingerprint


def test_ids_that_stop_an_answer_are_part_of_what_an_index_is_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokenizer"
    index_chat(tmp_path, open_tokenizer(folder, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="</s>"), ["a"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    forbid_building(monkeypatch)
    with pytest.raises(AssertionError):
        index_chat(tmp_path, Tokenizer(folder), ["a"])


def test_file_that_grows_between_its_digest_and_its_reading_leaves_no_index(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, build_source = write_rows(tmp_path / "data.jsonl", [{"text": "ab"}]), index_module.build_source

    def grow_first(*words: Any) -> None:
        write_rows(path, [{"text": "ab"}, {"text": "cd"}])
        build_source(*words)

    monkeypatch.setattr(index_module, "build_source", grow_first)
    with pytest.raises(DataError, match=r"data\.jsonl changed while it was read; start again when it is complete$"):
        open_index(path, tokenizer)
    assert not list((tmp_path / "cache/index").glob("*/tokens.bin"))
    monkeypatch.setattr(index_module, "build_source", build_source)
    assert len(open_index(write_rows(path, [{"text": "ab"}]), tokenizer)) == 1


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [change_byte, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "facts.json", "manifest.json"])
def test_damaged_index_is_built_again(tmp_path: Path, tokenizer: Tokenizer, name: str, damage: Any) -> None:
    first = index_chat(tmp_path, tokenizer, ["a", "bc"] * 20)
    expected, fingerprint = labels_of(first), first.fingerprint
    (folder,) = [entry for entry in (tmp_path / "cache/index").iterdir() if entry.is_dir()]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    again = index_chat(tmp_path, tokenizer, ["a", "bc"] * 20)
    assert (labels_of(again), again.fingerprint) == (expected, fingerprint)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [entry for entry in (tmp_path / "cache/index").iterdir() if entry.is_dir()] == [folder]


def test_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"dataset\.cache_folder: .*file.* cannot be written: Not a directory; name another folder"):
        index_chat(tmp_path, tokenizer, ["a"], cache_folder=str(tmp_path / "file" / "cache"))


def test_full_disk_is_named_and_nothing_half_made_is_left(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(DataError, match=r"dataset\.cache_folder: .*cache/index cannot be written: No space left on device"):
        index_chat(tmp_path, tokenizer, ["a"])
    assert [entry.suffix for entry in (tmp_path / "cache/index").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["chat", "text", "plain"])
def test_index_is_the_same_to_the_byte_for_any_number_of_workers(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = write_chats(tmp_path / "data.jsonl", 900)
    if kind == "text":
        path = write_rows(tmp_path / "texts.jsonl", [{"text": line} for line in path.read_text().splitlines()])
    if kind == "plain":
        path = path.rename(tmp_path / "data.txt")
    made = []
    for num_workers in (1, 2, 3):
        cache = tmp_path / f"cache{num_workers}"
        open_index(path, tokenizer, 100, num_workers=num_workers, cache_folder=str(cache))
        made.append({file.name: file.read_bytes() for file in cache.glob("index/*/*")})
    assert made[0] == made[1] == made[2]
    assert set(made[0]) == {"tokens.bin", "documents.npy", "facts.json", "manifest.json"}


# Several sources.


def test_sources_of_a_mix_keep_their_own_documents_and_places(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("ab", "cde", "", "x" * 300)])
    write_rows(tmp_path / "b.jsonl", [chat("yes"), chat("no")])
    mix = tuple(MixedSource(path=str(tmp_path / name), weight=1.0) for name in ("a.jsonl", "b.jsonl"))
    index = open_index(None, tokenizer, 200, mix=mix)
    assert index.source.tolist() == [0, 0, 0, 0, 1, 1]
    alone = [open_index(tmp_path / name, tokenizer, 200) for name in ("a.jsonl", "b.jsonl")]
    assert inputs_of(index) == inputs_of(alone[0]) + inputs_of(alone[1])
    assert index.where(3) == f"{tmp_path / 'a.jsonl'}:4"
    assert index.where(5) == f"{tmp_path / 'b.jsonl'}:2"
    assert index.notes == alone[0].notes + alone[1].notes
    assert set(index.fingerprint) == {f"{name} of dataset.mix {number}" for number in (1, 2) for name in alone[0].fingerprint}


# Documents held out.


def test_held_out_split_is_disjoint_complete_and_the_same_every_time() -> None:
    index = make_index([1 + number % 7 for number in range(400)])
    training, held_out = split_held_out(index, 0.25)
    assert sorted([*training.lines, *held_out.lines]) == index.lines.tolist()
    again = split_held_out(index, 0.25)
    assert np.array_equal(again[0].lines, training.lines)
    assert np.array_equal(again[1].lines, held_out.lines)


def texts_of(index: Index) -> set[tuple[int, ...]]:
    return set(map(tuple, inputs_of(index)))


@given(st.permutations(range(40)), st.integers(1, 39), st.lists(st.integers(0, 39), max_size=10))
@settings(max_examples=10, deadline=None)
def test_held_out_documents_are_chosen_by_content_and_not_by_place(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cut: int, repeated: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("held_out")
    tokenizer = open_tokenizer(folder / "tokenizer", ["<s>", "</s>"], eos_token="</s>")
    texts = [{"text": f"document {number}"} for number in range(40)]
    usual = texts_of(split_held_out(open_index(write_rows(folder / "usual.jsonl", texts), tokenizer), 0.3)[1])
    (folder / "files").mkdir()
    write_rows(folder / "files" / "1.jsonl", [texts[number] for number in order[:cut]])
    write_rows(folder / "files" / "2.jsonl", [texts[number] for number in [*order[cut:], *repeated]])
    training, held_out = split_held_out(open_index(folder / "files", tokenizer), 0.3)
    assert texts_of(held_out) == usual
    assert texts_of(training).isdisjoint(usual)  # copies stay with their originals
    assert len(training) + len(held_out) == 40 + len(repeated)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pieces_of_one_document_are_on_one_side(tmp_path: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": f"document {number} " * 8} for number in range(60)])
    training, held_out = split_held_out(open_index(path, tokenizer, 20, num_workers=num_workers), 0.3)
    assert len(training) + len(held_out) == 5 * 60
    assert set(training.lines.tolist()).isdisjoint(held_out.lines.tolist())


def test_long_plain_text_gives_pieces_to_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "data.txt").write_text("".join(f"line {number}\n" for number in range(500)))
    training, held_out = split_held_out(open_index(tmp_path / "data.txt", tokenizer, 20), 0.3)
    assert len(training)
    assert len(held_out) == pytest.approx(0.3 * (len(training) + len(held_out)), rel=0.3)


def test_share_held_out_is_about_what_was_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, [f"document {number}" for number in range(4000)], 64)
    assert len(split_held_out(index, 0.25)[1]) == pytest.approx(1000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5)


def test_larger_fraction_holds_out_all_that_a_smaller_one_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    index = index_texts(tmp_path, tokenizer, [f"document {number}" for number in range(300)], 64)
    small, large = (set(split_held_out(index, fraction)[1].lines.tolist()) for fraction in (0.1, 0.4))
    assert small < large


@pytest.mark.parametrize(("fraction", "words"), [(1e-9, "held out"), (0.999999, "to train on")])
def test_split_that_leaves_one_side_empty_is_an_error(tmp_path: Path, tokenizer: Tokenizer, fraction: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        split_held_out(index_texts(tmp_path, tokenizer, ["a", "b", "c"], 8), fraction)


def test_selection_keeps_each_documents_facts_together() -> None:
    index = make_index([3, 1, 2])
    chosen = index.select(np.array([False, True, True]))
    assert (chosen.lengths.tolist(), chosen.lines.tolist(), labels_of(chosen)) == ([1, 2], [2, 3], labels_of(index)[1:])
