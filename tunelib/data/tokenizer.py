"""Tokenizers of model folders: a tokenizer.json or a tokenizer.model, and the special tokens and chat template named beside it.

One engine reads all: a tokenizer.model is converted to the tokenizer.json that gives the same ids. A special token written in a
text is parsed or left as plain text, place by place.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tunelib.data.json_rows import find_lone_surrogate
from tunelib.data.tokenizer_model import Converted, convert_tokenizer_model
from tunelib.errors import DataError, Stopped
from tunelib.files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Special tokens are renamed to a mark, private-use and not in the text, and a second character that says which.
MARKS = range(0x10FFFD, 0xFFFFF, -1)
FIRST_NAME = 0xF0000
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the [start, end) characters that each came from."""

    ids: list[int]
    offsets: list[Span]


class Tokenizer:
    """A tokenizer as it lies in a folder.

    Args:
        folder: with a tokenizer.json, which is preferred, or a tokenizer.model.
        added: special tokens put at the end of the vocabulary; see `with_tokens`.

    Attributes:
        special: the named special tokens ("bos_token", "eos_token", …) and their text.
        special_texts: of all special tokens, the longest first.
        chat_template: Jinja source, or None.
        stop_ids: ids that end an answer: eos, what generation_config.json adds, and the ends of a turn and of a message of Llama 3.
        digest: of everything that decides which ids a text becomes.
    """

    def __init__(self, folder: Path, added: Sequence[str] = ()):
        self.folder = folder
        self.added = tuple(added)
        self._file = _find_file(folder)
        self._settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        listed = self._settings.get("added_tokens_decoder", {})
        if not isinstance(listed, dict) or not all(_is_token(token) for token in listed.values()):
            raise DataError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not a table of tokens")
        converted = self._convert() if self._file.suffix == ".model" else None
        self._tokenizer = _load(self._file, json.dumps(converted.content).encode() if converted else None)
        self._add_tokens()
        if converted:
            _check_companion_tokens(folder, self._settings, self.id_of)
        named = {name: _text_of(value) for name, value in self._settings.items() if name.endswith("_token") and _is_token(value)}
        self.special = {**(converted.special if converted else {}), **named}
        self.chat_template = _find_template(folder, self._settings)
        self._added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special_texts = sorted((token.content for token in self._added_tokens.values() if token.special), key=len)[::-1]
        self.stop_ids = self._find_stop_ids(converted.stop if converted else ())
        self.digest = _digest([self._file, *(folder / name for name in COMPANIONS)], self.added)
        self._renamed: _Renamed | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def special_ids(self) -> dict[str, int]:
        """ "bos_token_id", "eos_token_id", "pad_token_id": those that there are, as a config.json names them."""
        ids = {f"{name}_id": self.id_of(self.special.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")}
        return {name: value for name, value in ids.items() if value is not None}

    @functools.cached_property
    def document_start_ids(self) -> list[int]:
        """What a document of running text begins with: what the tokenizer's post-processing puts first, such as bos."""
        return self._probe_ends()[0]

    @functools.cached_property
    def document_end_ids(self) -> list[int]:
        """What a document of running text ends with: what the tokenizer's post-processing puts last, and eos unless that is it."""
        ids = self._probe_ends()[1]
        eos = self.id_of(self.special.get("eos_token", ""))
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def id_of(self, token: str) -> int | None:
        """The id of a token's text, or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool, special: Sequence[Span] | None = None) -> Encoded:
        """Ids of a text, and the characters of ``text`` that each came from.

        Args:
            add_special_tokens: put bos and such where the tokenizer's own post-processing does.
            special: the places where a special token is written that is to be parsed, in order; wherever else one is written it is
                plain text. None parses all.
        """
        if special is None or (self._finds_all_special and list(special) == self.find_special(text)):
            with _saying(f"{self._file} cannot encode a text"):
                encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return Encoded(encoding.ids, encoding.offsets)
        if self._renamed is None or self._renamed.mark in text:
            with _saying(f"{self._file} cannot tell special tokens from text"):
                self._renamed = _Renamed(self._tokenizer, _choose_mark(text))
        return self._renamed.encode(text, add_special_tokens, special)

    def encode_document(self, text: str, *, parse_special_tokens: bool = False) -> Encoded:
        """A document of running text between `document_start_ids` and `document_end_ids`, which come from no character.

        Args:
            parse_special_tokens: parse special tokens written in the text, which else are plain text; one that ends with eos then
                gets no second.
        """
        body = self.encode(text, add_special_tokens=False, special=None if parse_special_tokens else ())
        start, end = self.document_start_ids, self.document_end_ids
        if parse_special_tokens and end and body.ids[-len(end) :] == end:
            end = []
        offsets = [(0, 0)] * len(start) + body.offsets + [(len(text), len(text))] * len(end)
        return Encoded(start + body.ids + end, offsets)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def find_special(self, text: str) -> list[Span]:
        """The places where special tokens are written in a text: from the left, the longest first, as they would be parsed."""
        if not any(start in text for start in self._special_starts):
            return []
        special = set(self.special_texts)
        return [match.span() for match in self._added_pattern.finditer(text) if match.group() in special]

    def with_tokens(self, texts: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with further special tokens, whose ids follow the largest in the order given.

        Raises:
            DataError: one is a token already.
        """
        return Tokenizer(self.folder, (*self.added, *texts))

    def files_to_write(self) -> dict[str, bytes]:
        """Name and content of the tokenizer files that an export carries in place of the folder's own."""
        is_converted = self._file.suffix == ".model"
        if not self.added and not is_converted:
            return {}
        content = self._convert().content if is_converted else _read_json(self._file)
        tokens = {number: _describe_token(token) for number, token in sorted(self._added_tokens.items())}
        new = [{"id": number, **token} for number, token in tokens.items() if token["content"] in self.added]
        content["added_tokens"] = [*content.get("added_tokens", []), *new]
        settings = self._minimal_settings() if is_converted else _read_json(self.folder / "tokenizer_config.json")
        listed = {str(number): token for number, token in tokens.items()}
        settings["added_tokens_decoder"] = {**listed, **settings.get("added_tokens_decoder", {})}
        return {"tokenizer.json": _to_json_bytes(content), "tokenizer_config.json": _to_json_bytes(settings)}

    def _convert(self) -> Converted:
        add_bos, add_eos = (bool(self._settings.get(name, default)) for name, default in (("add_bos_token", True), ("add_eos_token", False)))
        return convert_tokenizer_model(self._file, add_bos=add_bos, add_eos=add_eos)

    def _add_tokens(self) -> None:
        if not self.added:
            return
        for expected, text in enumerate(self.added, start=self.vocab_size):
            known = self.id_of(text)
            if known is not None or not text:
                raise DataError(f"{text!r} cannot be added as a token to {self._file}: it is {'empty' if not text else f'there already, id {known}'}")
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])
            if self.id_of(text) != expected:
                raise DataError(f"{text!r} cannot be added as a token to {self._file}: some ids below {expected} have no token")

    def _find_stop_ids(self, stop: Sequence[str]) -> frozenset[int]:
        known = [self.id_of(text) for text in (self.special.get("eos_token", ""), *stop)]
        listed = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(isinstance(item, int) for item in ids):
            raise DataError(f"{self.folder / 'generation_config.json'}: eos_token_id = {listed!r} is neither an id nor a list of ids")
        return frozenset([*(number for number in known if number is not None), *ids])

    def _probe_ends(self) -> tuple[list[int], list[int]]:
        """What post-processing puts before and after a text."""
        with _saying(f"{self._file} cannot encode a text"):
            encoding = self._tokenizer.encode("a", add_special_tokens=True)
        inner = [place for place, is_put in enumerate(encoding.special_tokens_mask) if not is_put] or [len(encoding.ids)]
        return encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]

    def _minimal_settings(self) -> dict[str, Any]:
        """A tokenizer_config.json for a converted tokenizer.model."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= {name: text for name, text in self.special.items() if name in NAMED_TOKENS}
        if "model_max_length" in self._settings:
            settings["model_max_length"] = self._settings["model_max_length"]
        return settings if self.chat_template is None else settings | {"chat_template": self.chat_template}

    @functools.cached_property
    def _finds_all_special(self) -> bool:
        """Whether `find_special` sees what the library does, which looks for some tokens in the normalized text or between words."""
        special = [token for token in self._added_tokens.values() if token.special]
        is_normalized = self._tokenizer.normalizer is not None
        return not any(token.single_word or (token.normalized and is_normalized) for token in special)

    @functools.cached_property
    def _special_starts(self) -> set[str]:
        """The first two characters of every special token: a text without any of them is passed over at the speed of memory."""
        return {text[:2] for text in self.special_texts if text}

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        """Finds special tokens, and the other added tokens that may take characters from them."""
        tokens = [token for token in self._added_tokens.values() if token.content and (token.special or not token.normalized)]
        return re.compile("|".join(re.escape(token.content) for token in sorted(tokens, key=lambda token: len(token.content), reverse=True)))


class _Renamed:
    """A tokenizer whose special tokens have, under the same ids, names that do not occur in a text: only places put there are parsed.

    Being added tokens of the library still, they take the white space beside them, split the text and stop what is put before its
    first word as they do under their own names.

    Args:
        tokenizer: whose special tokens are renamed.
        mark: a character that begins every name, and that no text to encode may hold.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, mark: str):
        self.mark = mark
        texts = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._names = {text: mark + chr(FIRST_NAME + number) for number, text in enumerate(texts)}
        stored = _rename_special_tokens(json.loads(tokenizer.to_str()), self._names)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
        ids = self._tokenizer.get_vocab()
        moved = [token for token, number in tokenizer.get_vocab().items() if ids.get(self._names.get(token, token)) != number]
        assert not moved, f"renaming special tokens changed the ids of {moved[:4]}"

    def encode(self, text: str, add_special_tokens: bool, special: Sequence[Span]) -> Encoded:
        """See `Tokenizer.encode`."""
        pieces, ends, renamed_ends, end, length = [], [0], [0], 0, 0
        for start, stop in special:
            name = self._names.get(text[start:stop])
            assert name is not None, f"characters {start} to {stop} are not a special token: {text[start:stop]!r}"
            assert start >= end, f"special tokens overlap or are out of order at character {start}"
            pieces += [text[end:start], name]
            length += start - end + len(name)
            end = stop
            ends.append(end)
            renamed_ends.append(length)
        with _saying("the tokenizer cannot encode a text"):
            encoding = self._tokenizer.encode("".join([*pieces, text[end:]]), add_special_tokens=add_special_tokens)
        if not special:
            return Encoded(encoding.ids, encoding.offsets)

        def place_of(renamed: int) -> int:
            before = bisect.bisect_right(renamed_ends, renamed) - 1
            return ends[before] + renamed - renamed_ends[before]

        return Encoded(encoding.ids, [(place_of(start), place_of(stop)) for start, stop in encoding.offsets])


def _rename_special_tokens(stored: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The content of a tokenizer.json with other names for special tokens; changes what it is given.

    A piece that the model itself makes of plain text, by a merge or because it is a single character, stays under its own name
    too: without it such text could not be encoded.
    """
    added, model = stored["added_tokens"], stored["model"]
    for token in added:
        if token["special"]:
            token["content"] = names[token["content"]]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores, the place being the id
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        return stored
    kept = {text: vocab[text] for text in names if text in vocab}
    if kept:
        made = {text for merge in model.get("merges", []) for text in (*merge, "".join(merge))}
        kept = {text: number for text, number in kept.items() if len(text) == 1 or text in made}
    model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()} | kept
    for token in added:
        model["vocab"].setdefault(token["content"], token["id"])
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return stored


def _choose_mark(text: str) -> str:
    """A private-use character that does not occur in a text."""
    used = set(text)
    mark = next((chr(number) for number in MARKS if chr(number) not in used), None)
    if mark is None:
        raise DataError("a text holds every private-use character of plane 16, which leaves none to tell special tokens from plain text")
    return mark


def _find_file(folder: Path) -> Path:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no tokenizer.json and no tokenizer.model; name a folder that has one with model.tokenizer_path")


def _load(file: Path, content: bytes | None = None) -> tokenizers.Tokenizer:
    """The library's tokenizer from a tokenizer.json, or from ``content`` that was made of a file, without padding and truncation.

    Offsets include white space (trim_offsets = false): those of tokens that are only white space would else be empty. The setting
    is written by hand because parsing the whole file here would take as long as the library takes.
    """
    with _saying(f"{file} cannot be read"):
        content = file.read_bytes() if content is None else content
        tokenizer = tokenizers.Tokenizer.from_buffer(re.sub(rb'("trim_offsets"\s*:\s*)true\b', rb"\1false", content))
    if not tokenizer.get_vocab_size():
        raise DataError(f"{file} has no tokens")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Turn what the library raises, a bare Exception or a panic that is none, into a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, Stopped):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {error}") from None


def _check_companion_tokens(folder: Path, settings: dict[str, Any], id_of: Callable[[str], int | None]) -> None:
    """Refuse a tokenizer.model whose companions add tokens to it: how they split a text is known only to a tokenizer.json."""
    tokens = {_text_of(token): number for number, token in settings.get("added_tokens_decoder", {}).items()} | _read_json(
        folder / "added_tokens.json"
    )
    for text, number in tokens.items():
        if str(id_of(text)) != str(number):
            raise DataError(
                f"{folder} gives token {text!r} the id {number}, but tokenizer.model gives it {'none' if id_of(text) is None else id_of(text)}: "
                "name a folder that has a tokenizer.json with model.tokenizer_path"
            )


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, nothing where the file is missing; raises DataError."""
    content = read_json(path, DataError) if path.is_file() else {}
    with _saying(f"{path} cannot be read"):
        half = find_lone_surrogate(content)
    if half:
        raise DataError(f"{path} holds {half}, which is half of a character; no tokenizer can read it")
    return content


def _to_json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _text_of(token: str | dict[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _describe_token(token: tokenizers.AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in ("content", "single_word", "lstrip", "rstrip", "normalized", "special")}


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)}
        if "default" not in named:
            raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template is a list without one named 'default'")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _digest(files: Sequence[Path], added: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    for text in added:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:32]
