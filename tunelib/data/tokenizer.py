"""Tokenizers of Hugging Face folders: a tokenizer.json, and the special tokens and chat template named beside it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tunelib.errors import DataError
from tunelib.files import read_json


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the [start, end) characters that each came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """A tokenizer as it lies in a folder.

    Attributes:
        special: the named special tokens ("bos_token", "eos_token", …) and their text.
        chat_template: Jinja source, or None.
        stop_ids: ids that end an answer: eos, and what generation_config.json adds.
        digest: of every file that decides which ids a text becomes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "tokenizer.json").is_file():
            found = "; it has tokenizer.model, which is not read yet" if (folder / "tokenizer.model").is_file() else ""
            raise DataError(f"{folder} has no tokenizer.json{found}; name a folder that has one with model.tokenizer_path")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_with_whole_offsets(_read_json(folder / "tokenizer.json"))))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        self.special = {name: _text_of(settings[name]) for name in settings if name.endswith("_token") and _is_token(settings[name])}
        self.chat_template = _find_template(folder, settings)
        self.special_texts = sorted((token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special), key=len)[::-1]
        self.stop_ids = self._find_stop_ids()
        self.digest = _digest(folder)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def special_ids(self) -> dict[str, int]:
        """ "bos_token_id", "eos_token_id", "pad_token_id": those that there are, as a config.json names them."""
        ids = {f"{name}_id": self.id_of(self.special.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")}
        return {name: value for name, value in ids.items() if value is not None}

    def id_of(self, token: str) -> int | None:
        """The id of a token's text, or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        """Ids of a text; ``add_special_tokens`` puts bos and such where the tokenizer's own post-processing does."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(encoding.ids, encoding.offsets)

    def encode_document(self, text: str) -> list[int]:
        """A document of running text: with the tokenizer's own bos, and eos at its end."""
        ids = self.encode(text, add_special_tokens=True).ids
        eos = self.id_of(self.special.get("eos_token", ""))
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _find_stop_ids(self) -> frozenset[int]:
        eos = self.id_of(self.special.get("eos_token", ""))
        listed = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(isinstance(item, int) for item in ids):
            raise DataError(f"{self.folder / 'generation_config.json'}: eos_token_id = {listed!r} is neither an id nor a list of ids")
        return frozenset([*([] if eos is None else [eos]), *ids])


def _with_whole_offsets(stored: Any) -> Any:
    """A tokenizer.json whose offsets include white space: those of tokens that are only white space would else be empty."""
    if isinstance(stored, dict):
        return {key: False if key == "trim_offsets" else _with_whole_offsets(value) if key != "model" else value for key, value in stored.items()}
    return [_with_whole_offsets(item) for item in stored] if isinstance(stored, list) else stored


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, nothing where the file is missing; raises DataError."""
    return read_json(path, DataError) if path.is_file() else {}


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _text_of(token: str | dict[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template is a list without one named 'default'")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:32]
