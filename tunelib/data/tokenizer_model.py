"""A tokenizer.model file made into the content of a tokenizer.json that gives the same ids.

Two kinds of file have this name: sentencepiece's (Llama 2, Mistral), of which the BPE ones are read, and Meta's list of byte
sequences for tiktoken (Llama 3). What cannot be reproduced exactly is refused, never approximated.

All three libraries encode by joining the best pair of neighbours until none can be joined. sentencepiece and tiktoken join two
neighbours whenever they spell a known piece; tokenizers only if that pair is on its list of merges. One entry for each piece is
enough: as long as nothing has been joined across the borders of a piece, what happens between them is what happens to the piece
alone, so only the pair that is left last when the piece itself is encoded can ever become that piece (see `find_last_pair`).
"""

import base64
import binascii
import graphlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunelib.errors import DataError

Piece = TypeVar("Piece", str, bytes)
Pair = tuple[str, str]

SPACE = "▁"  # what sentencepiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
# Numbers of the fields of sentencepiece_model.proto that its Python package does not show.
PIECES, TRAINER_SPEC, NORMALIZER_SPEC, PIECE_TYPE = 1, 2, 3, 3
MODEL_TYPE, WHITESPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35  # of TrainerSpec
CHARSMAP, DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 2, 3, 4, 5  # of NormalizerSpec

# Llama 3 (llama_models/llama3/tokenizer.py): 128,000 byte sequences, then 256 special tokens.
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_NUM_RANKS, LLAMA3_NUM_SPECIAL = 128_000, 256
LLAMA3_NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
    *("<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)


@dataclass(frozen=True)
class Converted:
    """What a tokenizer.model says, in the words of a Hugging Face folder.

    Attributes:
        content: of a tokenizer.json.
        special: "bos_token", "eos_token", "unk_token", "pad_token": the text of those that there are.
        stop: texts of tokens other than eos that end an answer.
    """

    content: dict[str, Any]
    special: dict[str, str]
    stop: tuple[str, ...] = ()


def convert_tokenizer_model(path: Path, *, add_bos: bool = True, add_eos: bool = False) -> Converted:
    """The tokenizer in a tokenizer.model file.

    Where sentencepiece puts a space before a text, it stands before every stretch of text between special tokens.

    Args:
        add_bos, add_eos: what encoding with special tokens puts around a text; bos, as Llama does, unless told otherwise.

    Raises:
        DataError: it cannot be read, or tokenizers cannot give the same ids.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\s", stored):
        return _convert_tiktoken(path, stored, add_bos, add_eos)
    return _convert_sentencepiece(path, stored, add_bos, add_eos)


def find_last_pair(piece: Piece, ranks: Mapping[Piece, int]) -> tuple[Piece, Piece] | None:
    """The two parts that encoding a piece joins last, best rank first and then from the left; None if it never becomes one."""
    parts = [piece[place : place + 1] for place in range(len(piece))]
    get, last = ranks.get, len(ranks)
    joined = [get(left + right, last) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2:
        best = min(joined)
        if best == last:
            return None
        place = joined.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        del joined[place]
        if place:
            joined[place - 1] = get(parts[place - 1] + parts[place], last)
        if place < len(joined):
            joined[place] = get(parts[place] + parts[place + 1], last)
    return parts[0], parts[1]


def _convert_tiktoken(path: Path, stored: bytes, add_bos: bool, add_eos: bool) -> Converted:
    ranks = _read_ranks(path, stored)
    if len(ranks) != LLAMA3_NUM_RANKS:
        raise DataError(
            f"{path} lists {len(ranks)} byte sequences; only Llama 3's, of {LLAMA3_NUM_RANKS}, is known: name a folder with a tokenizer.json"
        )
    names = _byte_names()
    spell = {token: "".join(names[byte] for byte in token) for token in ranks}
    pairs = (find_last_pair(token, ranks) for token in ranks if len(token) > 1)
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(2, LLAMA3_NUM_SPECIAL))
    special = [*LLAMA3_NAMED, *reserved][:LLAMA3_NUM_SPECIAL]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content = _tokenizer_json(
        vocab={spell[token]: rank for token, rank in ranks.items()},
        merges=[(spell[pair[0]], spell[pair[1]]) for pair in pairs if pair],
        added=[_added_token(LLAMA3_NUM_RANKS + number, text, special=True) for number, text in enumerate(special)],
        bos=(special[0], LLAMA3_NUM_RANKS) if add_bos else None,
        eos=(special[1], LLAMA3_NUM_RANKS + 1) if add_eos else None,
        ignore_merges=True,  # tiktoken looks for the whole word first
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
    )
    return Converted(content, {"bos_token": special[0], "eos_token": special[1]}, stop=("<|eot_id|>", "<|eom_id|>"))


def _read_ranks(path: Path, stored: bytes) -> dict[bytes, int]:
    """The byte sequences of a tiktoken file by their rank, 0, 1, 2, …"""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(stored.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not a byte sequence in base64 and its rank: {line[:80]!r}") from None
        if len(ranks) != number or int(rank) != number - 1:
            raise DataError(f"{path}:{number}: byte sequences and ranks must be unique and in order, but this is {line[:80]!r}")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{path} does not list every single byte")
    return ranks


def _byte_names() -> list[str]:
    """The printable character that tokenizers' ByteLevel writes for each byte: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _convert_sentencepiece(path: Path, stored: bytes, add_bos: bool, add_eos: bool) -> Converted:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(stored)
        model = _read_fields(stored)
        trainer, normalizer = (_read_fields(b"".join(model[field])) for field in (TRAINER_SPEC, NORMALIZER_SPEC))
        types = [_number(_read_fields(piece), PIECE_TYPE, NORMAL) for piece in model[PIECES]]
        if not types:
            raise ValueError("it has no pieces")
    except Exception as error:  # the library raises bare RuntimeError, a cut-off field IndexError
        raise DataError(f"{path} cannot be read, neither as a sentencepiece model nor as tiktoken's: {error}") from None
    ids = list(range(processor.get_piece_size()))
    pieces, scores = processor.id_to_piece(ids), processor.get_score(ids)
    _check_convertible(path, trainer, normalizer, pieces, types)
    normal = {piece: score for piece, score, type in zip(pieces, scores, types, strict=True) if type == NORMAL}
    defined = [re.escape(piece) for piece, type in zip(pieces, types, strict=True) if type == USER_DEFINED]
    if defined:  # a piece around one that users defined is never made: that one stands alone wherever it is written
        search = re.compile("|".join(defined)).search
        normal = {piece: score for piece, score in normal.items() if not search(piece)}
    named = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id(), "pad": processor.pad_id()}
    special = {f"{name}_token": pieces[number] for name, number in named.items() if number >= 0}
    has_prefix, removes_extra = _number(normalizer, DUMMY_PREFIX, 1), _number(normalizer, REMOVE_EXTRA_WHITESPACES, 1)
    content = _tokenizer_json(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=_list_merges(path, normal),
        added=[
            _added_token(number, piece, special=type != USER_DEFINED)
            for number, (piece, type) in enumerate(zip(pieces, types, strict=True))
            if type in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        bos=(special["bos_token"], named["bos"]) if add_bos and "bos_token" in special else None,
        eos=(special["eos_token"], named["eos"]) if add_eos and "eos_token" in special else None,
        unk_token=special["unk_token"],
        fuse_unk=True,
        byte_fallback=bool(_number(trainer, BYTE_FALLBACK, 0)),
        normalizer={"type": "Sequence", "normalizers": [*_normalizers(bool(has_prefix), bool(removes_extra))]},
        decoder={"type": "Sequence", "decoders": [*_decoders(strips_first=bool(has_prefix or removes_extra))]},
    )
    return Converted(content, special)


def _check_convertible(
    path: Path, trainer: Mapping[int, list[Any]], normalizer: Mapping[int, list[Any]], pieces: list[str], types: list[int]
) -> None:
    """Refuse by name what tokenizers does otherwise than sentencepiece."""
    prefix, extra = _number(normalizer, DUMMY_PREFIX, 1), _number(normalizer, REMOVE_EXTRA_WHITESPACES, 1)
    by_type = {type: piece for piece, type in zip(pieces, types, strict=True)}
    letter = next((piece for piece, type in zip(pieces, types, strict=True) if len(piece) == 1 and type not in (NORMAL, USER_DEFINED)), "")
    reasons = {
        "its model type is not BPE": _number(trainer, MODEL_TYPE, 1) != BPE,
        "it normalizes characters (precompiled_charsmap)": any(normalizer.get(CHARSMAP, [])),
        "it keeps spaces as they are (escape_whitespaces = false)": not _number(normalizer, ESCAPE_WHITESPACES, 1),
        "it puts the space after a word (treat_whitespace_as_suffix)": prefix and _number(trainer, WHITESPACE_AS_SUFFIX, 0),
        f"piece {by_type.get(UNUSED)!r} is marked unused": UNUSED in by_type,
        f"piece {by_type.get(USER_DEFINED)!r} is user-defined while it has a dummy prefix": prefix and USER_DEFINED in by_type,
        f"piece {by_type.get(USER_DEFINED)!r} is user-defined while it removes extra white space": extra and USER_DEFINED in by_type,
        f"piece {letter!r} is a control token of one character": letter,
    }
    for reason, holds in reasons.items():
        if holds:
            raise DataError(f"{path} cannot be converted exactly: {reason}; name a folder that has a tokenizer.json with model.tokenizer_path")


def _normalizers(has_prefix: bool, removes_extra: bool) -> Iterator[dict[str, Any]]:
    """What sentencepiece does to a text first. It strips spaces at the front, and at the end also what looks like one."""
    if removes_extra:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if has_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if removes_extra:
        yield {"type": "Replace", "pattern": {"Regex": rf"{SPACE}+\z"}, "content": ""}


def _decoders(strips_first: bool) -> Iterator[dict[str, Any]]:
    yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if strips_first:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _list_merges(path: Path, scores: Mapping[str, float]) -> list[Pair]:
    """The merges of sentencepiece's pieces, best score first.

    sentencepiece joins pieces of equal score from the left, tokenizers in the order of this list, so that ties need a proof.
    """
    tied: dict[float, list[str]] = defaultdict(list)
    for piece, score in scores.items():
        tied[score].append(piece)
    ranks = {piece: rank for rank, score in enumerate(sorted(tied, reverse=True)) for piece in tied[score]}
    pairs = {piece: pair for piece in scores if len(piece) > 1 and (pair := find_last_pair(piece, ranks))}
    for piece, pair in pairs.items():
        if not all(part in scores for part in pair):
            raise DataError(f"{path} cannot be converted exactly: piece {piece!r} is made of {pair[0]!r} and {pair[1]!r}, which are not all pieces")
    merges: list[Pair] = []
    for score in sorted(tied, reverse=True):
        group = {piece: pairs[piece] for piece in tied[score] if piece in pairs}
        merges += [pairs[piece] for piece in _order_ties(path, group, pairs, ranks)]
    return merges


def _order_ties(path: Path, group: Mapping[str, Pair], pairs: Mapping[str, Pair], ranks: Mapping[str, int]) -> Sequence[str]:
    """An order of pieces of equal score in which "first of the list" always is "leftmost"; raises DataError where none is known.

    Runs of one letter (Llama's spaces): the longest first. All such runs being in the group, whatever stands right of the place of
    the last join is single letters, so a run that can grow is longer than any that can begin, and stands left of it.
    Others: where joining a piece lets no piece of this or a better score begin, joins disturb each other only by sharing a part,
    and the one that stands left then is the one that ends with it.
    """
    if len(group) < 2:
        return list(group)
    letters = {letter for piece in group for letter in piece}
    if len(letters) == 1 and {piece for piece in pairs if set(piece) == letters} == set(group):
        return sorted(group, key=len, reverse=True)
    rank = ranks[next(iter(group))]
    used = {part for piece, pair in pairs.items() if ranks[piece] <= rank for part in pair}
    beginning: dict[str, list[str]] = defaultdict(list)
    for piece, (left, _) in group.items():
        beginning[left].append(piece)
    after = {piece: {other for other in beginning[right] if other != piece} for piece, (_, right) in group.items()}
    order = _sort_topologically(after)
    if order is None or not used.isdisjoint(group):
        raise DataError(f"{path} cannot be converted exactly: pieces of equal score depend on each other, such as {sorted(group)[:4]}")
    return order


def _sort_topologically(after: Mapping[str, set[str]]) -> list[str] | None:
    """Every key before all of its values; None if they go in a circle."""
    try:
        return [*graphlib.TopologicalSorter(after).static_order()][::-1]
    except graphlib.CycleError:
        return None


def _added_token(number: int, text: str, *, special: bool) -> dict[str, Any]:
    """An entry of added_tokens; pieces that users defined are looked for in the text as sentencepiece writes it, with ▁ for spaces."""
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}


def _tokenizer_json(
    *,
    vocab: dict[str, int],
    merges: list[Pair],
    added: list[dict[str, Any]],
    bos: tuple[str, int] | None,
    eos: tuple[str, int] | None,
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The content of a tokenizer.json with a BPE model; ``bos`` and ``eos`` are put around a text."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(bos, eos),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": fuse_unk,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _post_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    """Puts bos and eos, each a token's text and id, around every text."""
    if bos is None and eos is None:
        return None

    def surround(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before, after = ([{"SpecialToken": {"id": token[0], "type_id": type_id}}] if token else [] for token in (bos, eos))
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    tokens = {token[0]: {"id": token[0], "ids": [token[1]], "tokens": [token[0]]} for token in (bos, eos) if token}
    return {"type": "TemplateProcessing", "single": surround("A", 0), "pair": surround("A", 0) + surround("B", 1), "special_tokens": tokens}


def _read_fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by number: ints and the bytes of everything longer; fixed-width numbers as bytes."""
    fields: dict[int, list[Any]] = defaultdict(list)
    place = 0
    while place < len(message):
        key, place = _read_varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _read_varint(message, place)
            fields[key >> 3].append(value)
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            length, place = _read_varint(message, place)
        fields[key >> 3].append(message[place : place + length])
        place += length
    return fields


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _number(fields: Mapping[int, list[Any]], field: int, default: int) -> int:
    """The last value of a number field, or the default that the schema gives it."""
    return fields[field][-1] if fields.get(field) else default
