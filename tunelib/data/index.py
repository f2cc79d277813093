"""The index: every document's tokens, once, in flat arrays, and what a run must know of them before it starts.

A *document* here is what stands in one row without being cut: n + 1 tokens that make n positions, since labels are shifted
where documents become rows. `Index.trained` marks the tokens that are trained as labels.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunelib.config.schema import Dataset
from tunelib.data.chat import ChatTemplate
from tunelib.data.sources import detect_format, digest_file, messages_of, read_rows, text_of
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError


@dataclass(frozen=True)
class Index:
    """The documents of one data set.

    Attributes:
        tokens: all tokens end to end, int32; ``trained`` beside it: which are trained as labels.
        starts: where each document begins in ``tokens``.
        lengths: its positions: its tokens less one.
        num_trained: its trained labels; at least one.
        lines: the line of its file that it came from.
        format: "chat", "instruct" or "text".
        fingerprint: name → digest or value of each thing that decides the documents.
        notes: what a person should know: the format found, documents cut or left out.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_trained: np.ndarray
    lines: np.ndarray
    format: str
    fingerprint: dict[str, Any]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, chosen: np.ndarray) -> "Index":
        """The same index with some of its documents."""
        per_document = {name: getattr(self, name)[chosen] for name in ("starts", "lengths", "num_trained", "lines")}
        return Index(self.tokens, self.trained, **per_document, format=self.format, fingerprint=self.fingerprint, notes=self.notes)


@dataclass
class _Builder:
    """Documents while they are collected, cut to what a row can hold."""

    seq_len: int
    too_long: str
    tokens: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    documents: list[tuple[int, int, int, int]] = field(default_factory=list)  # start, length, num_trained, line
    num_tokens: int = 0
    num_read: int = 0
    num_long: int = 0
    num_untrained: int = 0

    def add(self, tokens: np.ndarray, trained: np.ndarray, line: int, where: str) -> None:
        """Add one document, cut or left out as ``too_long`` says."""
        length = len(tokens) - 1
        self.num_read += 1
        if length > self.seq_len:
            self.num_long += 1
            if self.too_long == "error":
                raise DataError(f"{where}: {length + 1} tokens do not fit training.seq_len = {self.seq_len}; see dataset.too_long")
            if self.too_long == "drop":
                return
            if self.too_long == "truncate":
                length = self.seq_len
        self.tokens.append(tokens)
        self.trained.append(trained)
        num_before = len(self.documents)
        for first in range(0, length, self.seq_len):
            num_labels = min(self.seq_len, length - first)
            if num_trained := int(trained[first + 1 : first + 1 + num_labels].sum()):
                self.documents.append((self.num_tokens + first, num_labels, num_trained, line))
        self.num_untrained += len(self.documents) == num_before
        self.num_tokens += len(tokens)

    def notes(self, path: Path) -> list[str]:
        """What happened to documents on the way, where anything did."""
        done = {"truncate": "cut to the first", "split": "split into pieces of", "drop": "left out: longer than"}
        notes = [f"{path}: {self.num_long} documents {done[self.too_long]} {self.seq_len} tokens"] if self.num_long else []
        return notes + ([f"{path}: {self.num_untrained} documents left out: no token in them is trained"] if self.num_untrained else [])


def build_index(path: Path, section: Dataset, seq_len: int, tokenizer: Tokenizer, vocab_size: int) -> Index:
    """Read, tokenise and mark every document of a file.

    Args:
        section: the [dataset] section; ``path`` replaces its path, for a held-out file.
        seq_len: the most positions that a row can hold.
        vocab_size: the model's; a larger token id is an error.

    Raises:
        DataError: a bad row (with file and line), no document, or no trained token at all.
    """
    template, format, builder, notes = None, str(section.format), None, list[str]()
    for line, row in read_rows(path):
        where = f"{path}:{line}"
        if builder is None:
            if format == "auto":
                format = detect_format(row, section.columns, where)
                notes.append(f"{path}: read as {format!r}, by the columns of line {line}")
            _check_idle(section, format, where)
            if format != "text":
                template = ChatTemplate(tokenizer, section.chat_template)
            builder = _Builder(seq_len, _resolve_too_long(section.too_long, format))
        tokens, trained = _encode(row, format, section, tokenizer, template, where)
        if len(tokens) and tokens.max() >= vocab_size:
            raise DataError(
                f"{where}: the tokenizer gives id {tokens.max()}, but the model's vocabulary ends at {vocab_size - 1}: "
                "model.tokenizer_path is not the model's own, or model.vocab_size is too small"
            )
        builder.add(tokens, trained, line, where)
    if builder is None:
        raise DataError(f"{path} holds no document")
    if not builder.documents:
        if builder.too_long == "drop" and builder.num_long == builder.num_read:
            raise DataError(f"{path}: all {builder.num_read} documents are longer than training.seq_len = {seq_len}; see dataset.too_long")
        raise DataError(f"{path}: no token of {builder.num_read} documents is trained; look at the template, dataset.train_on and training.seq_len")
    tokens, trained = np.concatenate(builder.tokens), np.concatenate(builder.trained)
    starts, lengths, num_trained, lines = np.array(builder.documents, dtype=np.int64).T
    return Index(
        tokens,
        trained,
        *(starts, lengths, num_trained, lines),
        format=format,
        fingerprint={
            "file": digest_file(path),
            "tokens": hashlib.blake2b(tokens.tobytes() + trained.tobytes(), digest_size=16).hexdigest(),
            "tokenizer": tokenizer.digest,
            "chat template": hashlib.sha256(template.source.encode()).hexdigest()[:32] if template else "",
            "dataset.format": format,
            "dataset.train_on": section.train_on if template else "",
            "dataset.too_long": builder.too_long,
            "dataset.columns": vars(section.columns),
            "training.seq_len": seq_len,
        },
        notes=(*notes, *builder.notes(path)),
    )


def split_held_out(index: Index, fraction: float) -> tuple[Index, Index]:
    """The documents to train on, and those held out: chosen by a hash of each one's tokens, so that equal ones stay together.

    Raises:
        DataError: one of the two would be empty.
    """
    limit = int(fraction * 2**64)
    held_out = np.zeros(len(index), dtype=bool)
    for number, (start, length) in enumerate(zip(index.starts, index.lengths, strict=True)):
        digest = hashlib.blake2b(index.tokens[start : start + length + 1].tobytes(), digest_size=8).digest()
        held_out[number] = int.from_bytes(digest, "little") < limit
    if held_out.all() or not held_out.any():
        raise DataError(f"validation.fraction = {fraction} of {len(index)} documents leaves none {'to train on' if held_out.all() else 'held out'}")
    return index.select(~held_out), index.select(held_out)


def _check_idle(section: Dataset, format: str, where: str) -> None:
    """Refuse settings that data of this format has no use for; where the format is given, the config check has done so."""
    own = {"chat": ("messages",), "instruct": ("instruction", "input", "output"), "text": ("text",)}[format]
    default = Dataset()
    idle = [f"columns.{name}" for name, value in vars(section.columns).items() if name not in own and value != getattr(default.columns, name)]
    if format == "text":
        idle += [name for name in ("chat_template", "train_on") if getattr(section, name) != getattr(default, name)]
    if idle:
        raise DataError(f"{where}: the data is {format!r}, for which dataset.{idle[0]} has no effect; remove it, or set dataset.format")


def _resolve_too_long(choice: str, format: str) -> str:
    if choice == "auto":
        return "split" if format == "text" else "truncate"
    return choice


def _encode(
    row: dict[str, Any], format: str, section: Dataset, tokenizer: Tokenizer, template: ChatTemplate | None, where: str
) -> tuple[np.ndarray, np.ndarray]:
    if template is None:
        ids = tokenizer.encode_document(text_of(row, section.columns, where))
        trained = [True] * len(ids)
    else:
        messages = messages_of(row, format, section.columns, where)
        try:
            ids, trained = template.encode(messages)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if section.train_on == "all":
            trained = [True] * len(ids)
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=bool)
