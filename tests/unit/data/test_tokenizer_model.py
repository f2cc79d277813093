"""A converted tokenizer.model gives the ids of the library it was made for, or says why it cannot."""

import base64
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from assets.fetch_tokenizers import fetch_tokenizer
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer
from unit.data.test_tokenizer import awkward_texts
from unit.samples import write_tokenizer

from tunelib.data.tokenizer import Tokenizer
from tunelib.data.tokenizer_model import LLAMA3_SPLIT, convert_tokenizer_model, find_last_pair
from tunelib.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Pieces = list[tuple[str, float, int]]
ENDS: Pieces = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
LETTERS: Pieces = [("▁", -100, NORMAL), ("a", -101, NORMAL), ("b", -102, NORMAL)]
BYTES: Pieces = [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]


@pytest.fixture(scope="session")
def mistral() -> Path:
    """The folder of a sentencepiece model: BPE, byte fallback, a space put before the text, runs of spaces of equal score."""
    return fetch_tokenizer("mistral-v1")


@pytest.fixture(scope="session")
def llama3() -> Path:
    """The folder of Meta's tiktoken file."""
    return fetch_tokenizer("llama3")


def write_model(
    folder: Path,
    pieces: Pieces,
    *,
    model_type: int = 2,
    byte_fallback: bool = False,
    dummy_prefix: bool = True,
    removes_extra: bool = False,
    escapes: bool = True,
    suffix: bool = False,
    charsmap: bytes = b"",
    pad_id: int = -1,
) -> Path:
    """A tokenizer.model of sentencepiece's with these pieces: their text, score and type."""
    normalizer = field(1, b"identity") + (field(2, charsmap) if charsmap else b"")
    normalizer += field(3, dummy_prefix) + field(4, removes_extra) + field(5, escapes)
    trainer = field(3, model_type) + field(24, suffix) + field(35, byte_fallback) + field(40, 0) + field(41, 1) + field(42, 2) + field(43, pad_id)
    messages = [field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, type) for text, score, type in pieces]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"".join(field(1, message) for message in messages) + field(2, trainer) + field(3, normalizer))
    return folder


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value % 2**64)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def test_ids_and_text_are_those_of_sentencepiece(mistral: Path) -> None:
    ours, reference = Tokenizer(mistral), sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    assert ours.vocab_size == reference.get_piece_size()
    for text in awkward_texts():
        encoded = ours.encode(text, add_special_tokens=False, special=())
        assert encoded.ids == reference.encode(text), text
        assert ours.encode(text, add_special_tokens=True, special=()).ids == reference.encode(text, add_bos=True), text
        assert ours.decode(encoded.ids) == reference.decode(encoded.ids) == text.replace("▁", " ")
        for number, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            word = reference.id_to_piece(number).replace("▁", " ")
            source = text[start:stop].replace("▁", " ")
            assert word == source or (reference.is_byte(number) and stop == start + 1) or (start == 0 and word == " " + source) or word == " "


def test_ids_and_text_are_those_of_tiktoken(llama3: Path) -> None:
    lines = (llama3 / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    ours = Tokenizer(llama3)
    special = {text: ours.id_of(text) for text in ours.special_texts}
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
    assert ours.vocab_size == reference.n_vocab == 128256
    for text in awkward_texts():
        encoded = ours.encode(text, add_special_tokens=False, special=())
        assert encoded.ids == reference.encode(text, disallowed_special=()), text
        assert ours.decode(encoded.ids, skip_special_tokens=False) == text
        parsed = ours.encode(text, add_special_tokens=True)
        assert parsed.ids == [128000, *reference.encode(text, allowed_special="all")], text
        for number, (start, stop) in zip(parsed.ids[1:], parsed.offsets[1:], strict=True):
            word = reference.decode([number])
            assert word == text[start:stop] or "\ufffd" in word


def test_special_tokens_of_llama3_stand_after_the_byte_sequences(llama3: Path) -> None:
    tokenizer = Tokenizer(llama3)
    named = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
    named |= {"<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|reserved_special_token_2|>": 12, "<|reserved_special_token_245|>": 255}
    assert {text: tokenizer.id_of(text) for text in named} == {text: 128000 + number for text, number in named.items()}
    assert len(tokenizer.special_texts) == 256
    assert tokenizer.special == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert tokenizer.stop_ids == {128001, 128008, 128009}
    assert (tokenizer.document_start_ids, tokenizer.document_end_ids) == ([128000], [128001])


@pytest.mark.parametrize(("name", "added"), [("mistral", []), ("mistral", ["<|tool|>", "<|a|>"]), ("llama3", ["<|tool|>", "<|a|>"])])
def test_exported_folder_gives_the_same_ids_in_transformers(request: pytest.FixtureRequest, tmp_path: Path, name: str, added: list[str]) -> None:
    ours = Tokenizer(request.getfixturevalue(name), added)
    for file, content in ours.files_to_write().items():
        (tmp_path / file).write_bytes(content)
    reference, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert len(reference) == ours.vocab_size == again.vocab_size
    assert {name: getattr(reference, name) for name in ours.special} == ours.special == again.special
    for text in [f"{text}<|a|> {text}" for text in awkward_texts(200)]:
        assert reference(text)["input_ids"] == ours.encode(text, add_special_tokens=True).ids == again.encode(text, add_special_tokens=True).ids
        assert reference(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_special_tokens=False).ids
    assert set(json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]) == {
        str(ours.id_of(text)) for text in ours.special_texts
    }


def test_exported_settings_carry_the_template(tmp_path: Path) -> None:
    write_model(tmp_path, ENDS + LETTERS)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "model_max_length": 9, "chat_template": "{{ x }}"})
    )
    settings = json.loads(Tokenizer(tmp_path).files_to_write()["tokenizer_config.json"])
    assert {name: settings[name] for name in settings if name != "added_tokens_decoder"} == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 9,
        "chat_template": "{{ x }}",
    }


def test_tokenizer_json_is_preferred_and_the_digest_is_of_what_is_read(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a", ENDS + LETTERS), write_model(tmp_path / "b", [*ENDS, *LETTERS, ("ab", 1, NORMAL)])
    assert Tokenizer(first).digest != Tokenizer(second).digest
    assert Tokenizer(write_tokenizer(first, ["<x>"])).digest == Tokenizer(write_tokenizer(second, ["<x>"])).digest
    assert Tokenizer(first).id_of("<x>") == 0


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, True), (False, True), (False, False)])
def test_bos_is_put_unless_the_settings_say_otherwise(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    write_model(tmp_path, ENDS + LETTERS)
    settings = {"add_bos_token": bos, "add_eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    ids = Tokenizer(tmp_path).encode("ab", add_special_tokens=True).ids
    assert ids == [*([] if bos is False else [1]), 3, 4, 5, *([2] if eos else [])]
    assert Tokenizer(tmp_path).encode_document("ab").ids == [*([] if bos is False else [1]), 3, 4, 5, 2]


def test_named_tokens_are_the_models_and_special_texts_its_control_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path, [*ENDS, ("<pad>", 0, CONTROL), ("[INST]", 0, CONTROL), *LETTERS], pad_id=3))
    assert tokenizer.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert set(tokenizer.special_texts) == {"<s>", "</s>", "<unk>", "<pad>", "[INST]"}
    assert tokenizer.stop_ids == {2}
    assert tokenizer.encode("a[INST] b", add_special_tokens=True).ids == [1, 5, 6, 4, 5, 5, 7]


@pytest.mark.parametrize(
    ("name", "content"),
    [("added_tokens.json", {"<pad>": 6}), ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<end>"}}})],
)
def test_tokens_that_companions_add_are_refused_by_name(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    write_model(tmp_path, ENDS + LETTERS)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"gives token '<(pad|end)>' the id [26], but tokenizer\.model gives it none.*tokenizer\.json"):
        Tokenizer(tmp_path)


def test_companions_may_list_the_models_own_tokens(tmp_path: Path) -> None:
    write_model(tmp_path, ENDS + LETTERS)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"2": {"content": "</s>"}}, "pad_token": "<unk>"}))
    assert Tokenizer(tmp_path).special_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("changes", "pieces", "reason"),
    [
        ({"model_type": 1}, [], "model type is not BPE"),
        ({"escapes": False}, [], "escape_whitespaces"),
        ({"suffix": True}, [], "treat_whitespace_as_suffix"),
        ({}, [("ab", -1, UNUSED)], "'ab' is marked unused"),
        ({}, [("ab", -1, USER_DEFINED)], "'ab' is user-defined while it has a dummy prefix"),
        ({"dummy_prefix": False, "removes_extra": True}, [("▁▁", -1, USER_DEFINED)], "user-defined while it removes extra white space"),
        ({}, [("x", -1, CONTROL)], "'x' is a control token of one character"),
        ({}, [("ax", -1, NORMAL)], "'ax' is made of 'a' and 'x', which are not all pieces"),
        ({}, [("ab", -1, NORMAL), ("ba", -1, NORMAL)], "pieces of equal score depend on each other"),
        ({}, [("ab", -1, NORMAL), ("aba", -1, NORMAL)], "pieces of equal score depend on each other"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], pieces: Pieces, reason: str) -> None:
    with pytest.raises(DataError, match=rf"tokenizer\.model cannot be converted exactly: .*{reason}"):
        Tokenizer(write_model(tmp_path, ENDS + LETTERS + pieces, **changes))


def test_normalizing_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b c ab bc " * 30)
    settings = {"model_type": "bpe", "vocab_size": 10, "normalization_rule_name": "nmt_nfkc", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), **settings)
    with pytest.raises(DataError, match=r"normalizes characters \(precompiled_charsmap\)"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read, neither as a sentencepiece model"),
        (b"x", "cannot be read, neither as a sentencepiece model"),
        (b"\x0a\xff\xff", "cannot be read, neither as a sentencepiece model"),
        (b"IQ== 0\n", "does not list every single byte"),
        (b"IQ== 0\nIg== 2\n", r"tokenizer\.model:2: byte sequences and ranks must be unique and in order"),
        (b"IQ== 0\nIQ== 1\n", r"tokenizer\.model:2: byte sequences and ranks must be unique and in order"),
        (b"IQ== 0\nIg==\n", r"tokenizer\.model:2: not a byte sequence in base64"),
        (b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)), "lists 256 byte sequences; only Llama 3's"),
    ],
    ids=["empty", "short", "cut off", "few bytes", "gap", "twice", "no rank", "not Llama 3"],
)
def test_broken_tokenizer_model_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        Tokenizer(tmp_path)


def test_only_the_pair_that_is_left_last_can_become_a_piece() -> None:
    assert find_last_pair("ab", {}) == ("a", "b")
    assert find_last_pair("abc", {"bc": 0, "ab": 1, "abc": 2}) == ("a", "bc")
    assert find_last_pair("aaa", {"aa": 0, "aaa": 0}) == ("aa", "a")
    assert find_last_pair("abcd", {"bc": 0, "ab": 1, "cd": 2, "abcd": 3}) is None


def test_small_models_of_all_settings_give_sentencepieces_ids_or_are_refused(tmp_path: Path) -> None:
    """Random pieces and scores, many of them equal, over so few letters that joins compete everywhere."""
    chance, outcomes = random.Random(0), Counter[str]()
    for _ in range(600):
        pieces, settings = draw_model(chance)
        write_model(tmp_path, pieces, **settings)
        try:
            library = Library.from_str(json.dumps(convert_tokenizer_model(tmp_path / "tokenizer.model").content))
        except DataError as error:
            outcomes["refused" if "equal score" in str(error) else str(error)] += 1
            continue
        library.encode_special_tokens = True
        reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        texts = ["".join(chance.choices(" ▁abx", k=chance.randint(0, 14))) for _ in range(100)]
        for text in [*texts, *(letter * length for letter in " ab" for length in range(24))]:
            assert library.encode(text, add_special_tokens=False).ids == reference.encode(text), (pieces, settings, text)
        scores = [score for _, score, type in pieces if type == NORMAL]
        outcomes["equal with ties" if len(set(scores)) < len(scores) else "equal"] += 1
    assert outcomes.keys() == {"equal", "equal with ties", "refused"}
    assert min(outcomes.values()) > 30, outcomes


def draw_model(chance: random.Random) -> tuple[Pieces, dict[str, Any]]:
    """Pieces of two letters and the space, and settings for `write_model`."""
    words = sorted({"".join(chance.choices("▁ab", k=chance.randint(2, 5))) for _ in range(chance.randint(1, 14))})
    divisor = chance.choice((1, 1, 2))
    scores = [score // divisor for score in chance.sample(range(len(words)), len(words))]
    runs = {letter * length for letter in chance.choice(("", "▁", "a")) for length in range(2, 9) if chance.random() < 0.7}
    if runs:  # Llama's spaces: all runs of a letter, of one score
        words_and_scores = [(word, -score) for word, score in zip(words, scores, strict=True) if set(word) != set(min(runs))]
        pieces = [(word, float(score), NORMAL) for word, score in [*words_and_scores, *((run, chance.choice((-50, 50))) for run in sorted(runs)[:1])]]
        pieces += [(run, pieces[-1][1], NORMAL) for run in sorted(runs)[1:]]
    else:
        pieces = [(word, float(-score), NORMAL) for word, score in zip(words, scores, strict=True)]
    settings = {name: chance.random() < 0.5 for name in ("byte_fallback", "dummy_prefix", "removes_extra")}
    defined: Pieces = []
    if chance.random() < 0.3:
        settings |= {"dummy_prefix": False, "removes_extra": False}
        known = {piece for piece, *_ in pieces + LETTERS}
        defined = [(word, 0, USER_DEFINED) for word in {"".join(chance.choices("▁abx", k=chance.randint(1, 3)))} - known]
    return [*ENDS, *(BYTES if settings["byte_fallback"] else []), *pieces, *LETTERS, *defined], settings
