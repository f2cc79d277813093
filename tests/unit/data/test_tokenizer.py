"""A tokenizer is what lies in its folder; a folder that is not one says why."""

import functools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer
from unit.samples import DEBUG_TOKENIZER, REPOSITORY, open_tokenizer, write_tokenizer

from tunelib.data.tokenizer import FIRST_NAME, MARKS, Encoded, Span, Tokenizer
from tunelib.errors import DataError

# What tokenizers trip over: digits, white space of all kinds, letters of several characters, scripts, rare planes, look-alikes.
AWKWARD = (
    *("0", "12", "345", "1234567", "3.14", "½", "٣", "Ⅷ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\x0b"),
    *("\x00", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2003", "\u2028", "\u3000", "\u200b", "\u200d"),
    *("\ufeff", "😀", "👩🏽‍🚒", "👨‍👩‍👧‍👦", "🇩🇪", "❤️", "é", "e\u0301", "a\u0323\u0307\u0301", "ﬁ", "Å", "ß", "ẞ"),
    *("İ", "ı", "ŉ", "日本", "語", "汉字", "한국", "ᄒ\u1161", "שלום", "مرحبا", "\u202e", "हिन्दी", "ไทย", "𝒳", "𠀀"),
    *("𐍈", "\U000e0001", "\ue000", "\U000f0000", "\U0010fffd", "\uffff", "\ufffd", "▁", "▁▁", "Ġ", "<0x41>"),
    *("<0x0A>", "'s", "'LL", "'ſ", "don't", "Hello", "the", "ing", "camelCase", "def f(x):", "    return"),
    *("...", "======", "-->", "{}", "\\", '"', "_", "a", "b", "Z", "<s>", "</s>", "<unk>", "<s", "<|im_start|>"),
    *("<|im_end|>", "<|im_end|", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>"),
)
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 257)
TEXT = "Where does Greta live?\n  Greta — naïve — lives\tnear the school. 日本 🙂 <|im_end|>\n"


def awkward_texts(count: int = 2000, seed: int = 0) -> list[str]:
    """Runs of single characters, nothing at all, and random strings of AWKWARD pieces."""
    chance = random.Random(seed)
    texts = ["", *(letter * length for letter in " \n\ta=0▁é😀日" for length in LENGTHS)]
    return texts + ["".join(chance.choices(AWKWARD, k=chance.randint(1, 24))) for _ in range(count - len(texts))]


def test_folder_without_tokenizer_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json.*model\.tokenizer_path"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_broken_tokenizer_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut off", "list", "not UTF-8", "deep"])
def test_broken_companion_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": 3})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"template": "x"}]})),
        ("tokenizer_config.json", json.dumps({"chat_template": ["x"]})),
        ("generation_config.json", json.dumps({"eos_token_id": "</s>"})),
        ("generation_config.json", json.dumps({"eos_token_id": [[1]]})),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_companion_of_the_wrong_types_is_refused_by_name(tmp_path: Path, name: str, content: str | bytes) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=name):
        Tokenizer(tmp_path)


@pytest.fixture(params=["debug", "SmolLM2"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The shipped tokenizer, and a published one."""
    return DEBUG_TOKENIZER if request.param == "debug" else request.getfixturevalue("smollm2")


def test_ids_and_text_are_those_of_transformers(folder: Path) -> None:
    ours, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(TEXT, add_special_tokens=False).ids == reference(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, add_special_tokens=True).ids == reference(TEXT)["input_ids"]
    ids = reference(TEXT)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(reference)
    assert ours.special_ids == {name: getattr(reference, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_special_tokens_in_a_text_are_all_parsed_or_all_plain_as_the_library_does_it(folder: Path) -> None:
    ours, parsing, plain = Tokenizer(folder), Library.from_file(str(folder / "tokenizer.json")), Library.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    for text in awkward_texts():
        assert ours.encode(text, add_special_tokens=False).ids == parsing.encode(text, add_special_tokens=False).ids, text
        encoded = ours.encode(text, add_special_tokens=False, special=())
        assert encoded.ids == plain.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(encoded.ids, skip_special_tokens=False) == text
        check_offsets(ours, text, encoded)


def test_each_place_of_a_special_token_is_parsed_or_plain_as_told(folder: Path) -> None:
    ours, plain = Tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    chance, num_mixed = random.Random(1), 0
    for text in awkward_texts():
        text = f"<|im_end|>{text} <|im_start|>{text}<|im_end|>\n"
        places = ours.find_special(text)
        real = [place for place in places if chance.random() < 0.5]
        num_mixed += 0 < len(real) < len(places)
        expected, end = [], 0
        for start, stop in [*real, (len(text), len(text))]:
            expected += plain.encode(text[end:start], add_special_tokens=False).ids
            expected += [ours.id_of(text[start:stop])] if start < stop else []
            end = stop
        encoded = ours.encode(text, add_special_tokens=False, special=real)
        assert encoded.ids == expected, text
        check_offsets(ours, text, encoded)
    assert num_mixed > 1000


def check_offsets(tokenizer: Tokenizer, text: str, encoded: Encoded) -> None:
    """Every token that is whole characters is what its offsets cut out of the text; together they cover the text."""
    end = 0
    for number, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
        assert end - 1 <= start <= end < stop or start < stop == end, "tokens within one character may share it"
        word = tokenizer.decode([number], skip_special_tokens=False)
        assert word == text[start:stop] or "\ufffd" in word
        end = stop
    assert end == len(text)


def build_tokenizer(folder: Path, library: Library, tokens: Sequence[AddedToken], **settings: Any) -> Tokenizer:
    """The folder of a small tokenizer of the library, opened."""
    for token in tokens:
        library.add_special_tokens([token])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def letters_of(text: str) -> models.BPE:
    """One token for each of some characters, and unknown ones fused into <unk>."""
    vocab = {letter: number for number, letter in enumerate(["<unk>", *dict.fromkeys(text)])}
    return models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True)


def show(tokenizer: Tokenizer, text: str, special: Sequence[Span] | None) -> list[tuple[str, str]]:
    """Each token and the characters it came from."""
    encoded = tokenizer.encode(text, add_special_tokens=False, special=special)
    return [
        (tokenizer.decode([number], skip_special_tokens=False), text[slice(*place)])
        for number, place in zip(encoded.ids, encoded.offsets, strict=True)
    ]


def test_parsed_place_takes_the_white_space_that_the_token_strips_and_a_plain_one_none(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, Library(letters_of("ab <m>")), [AddedToken("<m>", lstrip=True, rstrip=True)])
    plain = [(letter, letter) for letter in " <m> b"]
    assert show(tokenizer, "a <m> b <m> b", [(2, 5)]) == [("a", "a"), ("<m>", " <m> "), ("b", "b"), *plain]
    assert show(tokenizer, "a <m> b <m> b", ()) == [("a", "a"), *plain, *plain]
    assert show(tokenizer, "a <m> b <m> b", None) == show(tokenizer, "a <m> b <m> b", [(2, 5), (8, 11)])


def test_space_before_the_first_word_is_put_as_the_library_does(tmp_path: Path) -> None:
    library = Library(letters_of("▁<s>ab"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = build_tokenizer(tmp_path, library, [AddedToken("<s>", normalized=False)])
    ids = functools.partial(tokenizer.encode, add_special_tokens=False)
    space, a, b, special = (tokenizer.id_of(token) for token in ("▁", "a", "b", "<s>"))
    letters = [tokenizer.id_of(letter) for letter in "<s>"]
    assert ids("<s>a<s>b", special=()).ids == [space, *letters, a, *letters, b]
    assert ids("<s>a<s>b", special=[(0, 3)]).ids == [special, a, *letters, b]
    assert ids("<s>a<s>b", special=[(4, 7)]).ids == [space, *letters, a, special, b]


def test_token_of_the_normalized_text_is_parsed_only_where_told(tmp_path: Path) -> None:
    library = Library(letters_of("▁<s>ab"))
    library.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("▁")])
    tokenizer = build_tokenizer(tmp_path, library, [AddedToken("<S>", normalized=True), AddedToken("<B>", normalized=False)])
    assert tokenizer.encode("a<S>", add_special_tokens=False, special=()).ids == library.encode("a<s>").ids
    for text in ("<B>a", "a<B>A", "<B>", "<B><B>a"):
        assert tokenizer.encode(f"{text}", add_special_tokens=False, special=tokenizer.find_special(text)).ids == library.encode(text).ids
    assert tokenizer.encode("A<B>a<S>", add_special_tokens=False, special=[(1, 4)]).ids[:3] == library.encode("A<B>").ids


@pytest.mark.parametrize("merges", [True, False], ids=["found whole", "by merges"])
def test_vocabulary_that_lists_its_special_tokens_does_not_give_them_for_plain_text(tmp_path: Path, merges: bool) -> None:
    vocab = {token: number for number, token in enumerate(["<s>", "<", "s", ">", "a"])}
    library = Library(models.BPE(vocab=vocab, merges=[], ignore_merges=merges))
    library.pre_tokenizer = pre_tokenizers.Whitespace() if not merges else pre_tokenizers.WhitespaceSplit()
    tokenizer = build_tokenizer(tmp_path, library, ["<s>"])
    assert tokenizer.encode("a <s>", add_special_tokens=False, special=()).ids == [4, 1, 2, 3]
    assert tokenizer.encode("<s> <s>", add_special_tokens=False, special=[(0, 3)]).ids == [0, 1, 2, 3]


def test_plain_text_that_is_a_special_token_of_one_character_keeps_its_id(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, Library(letters_of("ab")), [AddedToken("b", lstrip=True)])
    assert tokenizer.encode("abab", add_special_tokens=False, special=[(1, 2)]).ids == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"[UNK]": 0, "[CLS]": 1, "a": 2}, unk_token="[UNK]"),
        models.WordPiece({"[UNK]": 0, "[CLS]": 1, "a": 2}, unk_token="[UNK]"),
        models.Unigram([("[UNK]", 0.0), ("[CLS]", -1.0), ("a", -2.0)], unk_id=0),
    ],
    ids=["WordLevel", "WordPiece", "Unigram"],
)
def test_plain_text_of_other_models_is_unknown(tmp_path: Path, model: Any) -> None:
    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = build_tokenizer(tmp_path, library, ["[UNK]", "[CLS]"])
    ids = tokenizer.encode("[CLS] a [CLS]", add_special_tokens=False, special=[(0, 5)]).ids
    assert ids[:2] == [1, 2]
    assert set(ids[2:]) == {0}


def test_text_that_holds_the_names_of_renamed_tokens_is_plain(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, ["<s>", "<t>"])
    names = [f"{chr(mark)}{chr(FIRST_NAME)}{chr(mark)}{chr(FIRST_NAME + 1)}" for mark in MARKS[:3]]
    for text in [f"{before}<s>" for before in ("", *names, "".join(map(chr, MARKS[:9])))]:
        encoded = tokenizer.encode(text * 2, add_special_tokens=False, special=[(len(text) - 3, len(text))])
        assert encoded.ids.count(0) == 1
        assert 1 not in encoded.ids
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text * 2
    with pytest.raises(DataError, match="every private-use character"):
        tokenizer.encode("<s>" + "".join(map(chr, MARKS)), add_special_tokens=False, special=())


@pytest.mark.parametrize("places", [[(0, 2)], [(1, 4)], [(3, 6), (0, 3)]])
def test_place_that_is_no_special_token_is_our_fault(tmp_path: Path, places: list[Span]) -> None:
    with pytest.raises(AssertionError, match="special token"):
        open_tokenizer(tmp_path, ["<s>"]).encode("<s><s>", add_special_tokens=False, special=places)


def test_special_tokens_are_found_from_the_left_the_longest_first(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, ["<s>", "<s><t>", "<t>a", "bb"])
    assert tokenizer.find_special("bbb<s><t>a <s><t <t>a") == [(0, 2), (3, 9), (11, 14), (17, 21)]
    assert tokenizer.find_special("") == tokenizer.find_special("<b< b>s") == []


def test_other_added_tokens_are_parsed_everywhere(tmp_path: Path) -> None:
    library = Library(letters_of("<s>ab"))
    library.add_tokens([AddedToken("a<s", normalized=False), AddedToken("ab")])
    tokenizer = build_tokenizer(tmp_path, library, ["<s>"])
    assert tokenizer.find_special("a<s><s>") == [(4, 7)]
    for special in (None, [(2, 5)]):
        assert tokenizer.encode("ab<s>", add_special_tokens=False, special=special).ids == [tokenizer.id_of("ab"), tokenizer.id_of("<s>")]
    assert tokenizer.encode("ab<s>", add_special_tokens=False, special=()).ids[0] == tokenizer.id_of("ab")


def test_special_tokens_may_be_objects_and_the_tokenizer_config_wins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>", "</s>", "<e>"], bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", add_bos_token=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "pad_token": {"content": "<e>"}}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<e>"}
    assert tokenizer.special_ids == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize(("listed", "expected"), [(None, {1}), (2, {1, 2}), ([0, 2], {0, 1, 2})])
def test_answers_stop_at_eos_and_at_what_the_generation_config_adds(tmp_path: Path, listed: Any, expected: set[int]) -> None:
    write_tokenizer(tmp_path, ["<s>", "</s>", "<e>"], eos_token="</s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert Tokenizer(tmp_path).stop_ids == expected


def test_document_ends_with_one_eos(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, ["<s>", "</s>"], eos_token="</s>")
    assert (tokenizer.document_start_ids, tokenizer.document_end_ids) == ([], [1])
    encoded = tokenizer.encode_document("ab")
    assert (encoded.ids[-1], len(encoded.ids), encoded.offsets) == (1, 3, [(0, 1), (1, 2), (2, 2)])
    assert tokenizer.encode_document("ab</s>", parse_special_tokens=True).ids == encoded.ids
    assert len(tokenizer.encode_document("ab</s>").ids) == len("ab</s>") + 1
    assert tokenizer.encode_document("").ids == [1]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_document_stands_between_what_the_post_processing_puts_and_eos(tmp_path: Path, template: str) -> None:
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path, ["<s>", "</s>"], eos_token="</s>")
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.document_start_ids, tokenizer.document_end_ids) == ([0] if "<s>" in template else [], [1])
    encoded = tokenizer.encode_document("a<s>")
    put = [0] if "<s>" in template else []
    assert encoded.ids == put + tokenizer.encode("a<s>", add_special_tokens=False, special=()).ids + [1]
    assert encoded.offsets == [(0, 0)] * len(put) + [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]
    whole = tokenizer.encode("a<s>", add_special_tokens=True, special=()).ids
    assert whole == (encoded.ids if "</s>" in template else encoded.ids[:-1])


def test_saved_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>"])
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert len(Tokenizer(tmp_path).encode("abcd", add_special_tokens=False).ids) == 4


def test_template_of_its_own_file_wins_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["<s>"], template="from the config")
    assert Tokenizer(tmp_path).chat_template == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(tmp_path).chat_template == "from the file"


def test_default_is_taken_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer(tmp_path, ["<s>"], chat_template=several)
    assert Tokenizer(tmp_path).chat_template == "plain"


def test_digest_follows_what_decides_the_ids_and_not_where_it_lies(tmp_path: Path) -> None:
    one, same, other = (write_tokenizer(tmp_path / name, ["<s>"] if name != "other" else ["<t>"]) for name in ("one", "same", "other"))
    assert Tokenizer(one).digest == Tokenizer(same).digest != Tokenizer(other).digest
    (same / "tokenizer.model").write_bytes(b"is not read where there is a tokenizer.json")
    assert Tokenizer(one).digest == Tokenizer(same).digest != Tokenizer(one).with_tokens(["<t>"]).digest


def test_folder_that_was_not_changed_is_exported_as_it_is(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path, ["<s>"]).files_to_write() == {}


def test_added_tokens_follow_the_vocabulary_and_are_exported_as_transformers_adds_them(folder: Path, tmp_path: Path) -> None:
    new = ["<|tool|>", "<|a|>", "<|b b|>"]
    base, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    reference.add_tokens([AddedToken(text, special=True, normalized=False) for text in new])
    ours = base.with_tokens(new[:1]).with_tokens(new[1:])
    assert [ours.id_of(text) for text in new] == list(range(base.vocab_size, base.vocab_size + 3))
    assert (ours.folder, ours.vocab_size) == (base.folder, base.vocab_size + 3)
    for name, content in ours.files_to_write().items():
        (tmp_path / name).write_bytes(content)
    written, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert len(written) == ours.vocab_size
    assert written.special_tokens_map == reference.special_tokens_map
    for text in [f"{text}<|a|> <|b b|>{text}<|tool|>" for text in awkward_texts(200)]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert reference(text, add_special_tokens=False)["input_ids"] == written(text, add_special_tokens=False)["input_ids"] == ids
        assert again.encode(text, add_special_tokens=False, special=()) == ours.encode(text, add_special_tokens=False, special=())
        assert written.decode(ids, skip_special_tokens=True) == ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("added", "reason"), [(["<s>"], "id 0"), (["<t>", "<t>"], "id 257"), (["a"], "is there already"), ([""], "empty")])
def test_token_that_is_there_already_cannot_be_added(tmp_path: Path, added: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_tokenizer(tmp_path, ["<s>"]).with_tokens(added)


def test_tokens_cannot_be_added_to_a_vocabulary_with_holes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, Library(models.BPE(vocab={"a": 0, "b": 5}, merges=[])), [])
    with pytest.raises(DataError, match="some ids below 6 have no token"):
        tokenizer.with_tokens(["<t>"])


def test_tokenizer_json_is_read_without_sentencepiece() -> None:
    reading = f"from tunelib.data.tokenizer import Tokenizer; Tokenizer(pathlib.Path({str(DEBUG_TOKENIZER)!r}))"
    program = f"import pathlib, sys; {reading}; print('sentencepiece' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
