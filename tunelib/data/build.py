"""Builds the index of one source: every document tokenised once, cut to what a row can hold, and written to a folder.

The folder holds ``tokens.bin`` (marked tokens, int32, end to end), ``documents.npy`` (each of `COLUMNS` for all documents) and
``facts.json``. A document is written while it is read: memory does not grow with the source's tokens.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tunelib.data.encode import (
    ALL_TRAINED,
    DOUBLE_BOS,
    NO_STOP,
    SAME_ROLE,
    SPECIAL_TEXT,
    TOOLS_UNSEEN,
    Reading,
    TextPart,
    read_trained,
)
from tunelib.data.sources import OpenedSource, RawRow, RawText
from tunelib.data.workers import Documents, Part, Rows, digest_tokens, work_on_all
from tunelib.errors import DataError

COLUMNS = ("starts", "lengths", "num_trained", "files", "lines", "digests")
TOKENS_FILE, DOCUMENTS_FILE, FACTS_FILE = "tokens.bin", "documents.npy", "facts.json"
# A task for a worker: large enough that asking costs little, small enough that all have one.
ROWS_PER_TASK, BYTES_PER_TASK = 256, 1 << 18
BYTES_PER_NUMBER = 8
# How far down a row is looked into for its size: row, messages, message, content, part of the content, its text.
SIZED_LEVELS = 6
# Of a text before and after a part: tokens far from its edges do not depend on what lies beyond.
CONTEXT_CHARS = 1024
REMARKS = (
    (SPECIAL_TEXT, "special_text"),
    (NO_STOP, "no_stop"),
    (DOUBLE_BOS, "double_bos"),
    (ALL_TRAINED, "all_trained"),
    (TOOLS_UNSEEN, "tools_unseen"),
    (SAME_ROLE, "same_role"),
)
WRITE_BYTES = 1 << 20


@dataclass
class Facts:
    """What happened to the documents of a source, in numbers and with the place of the first case.

    Attributes:
        format: of the rows.
        num_read: documents read; ``num_long`` of them longer than a row, ``num_untrained`` left out because nothing in them is trained.
        num_all_trained: with every token trained although only answers should be.
        num_seams: places where two parts of a long text are tokenised differently from the whole.
        examples: name of a number → file and line of the first document that it counts.
        tokens_digest: of all marked tokens.
    """

    format: str
    num_read: int = 0
    num_long: int = 0
    num_untrained: int = 0
    num_special_text: int = 0
    num_no_stop: int = 0
    num_double_bos: int = 0
    num_all_trained: int = 0
    num_tools_unseen: int = 0
    num_same_role: int = 0
    num_seams: int = 0
    examples: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens_digest: str = ""

    def count(self, name: str, file: int, line: int) -> None:
        """Add one to ``num_<name>``, and keep the place of the first."""
        setattr(self, f"num_{name}", getattr(self, f"num_{name}") + 1)
        self.examples.setdefault(name, (file, line))


@dataclass
class Builder:
    """Documents while they are collected: cut to rows of ``seq_len`` positions, and written to ``file``."""

    file: BinaryIO
    source: OpenedSource
    seq_len: int
    too_long: str
    facts: Facts
    documents: array = field(default_factory=lambda: array("q"))
    num_tokens: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    # The document that is being read: what is not yet written of it, and what is known of it.
    pending: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    pending_lines: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_seen: int = 0
    num_before: int = 0
    first_line: int = 0
    remarks: int = 0

    def add(
        self,
        marked: np.ndarray,
        lines: np.ndarray,
        file: int,
        line: int,
        remarks: int = 0,
        is_last: bool = True,
        digest: int | None = None,
    ) -> None:
        """Add a document or a part of one, cut or left out as ``too_long`` says.

        Args:
            marked: N tokens, marked as in `data/encode.py`.
            lines: of each token.
            line: where the document or the part begins.
            remarks: what a person should hear of it: bits as in `data/encode.py`.
            digest: of the whole document, which all its pieces share so that they are held out together; without, each has its own.
        """
        if not self.first_line:
            self.first_line, self.num_before = line, len(self.documents)
        self.num_seen += len(marked)
        self.remarks |= remarks
        if self.too_long == "error" and self.num_seen - 1 > self.seq_len:
            where = self.source.where(file, self.first_line)
            number = self.num_seen if is_last else f"more than {self.seq_len + 1}"
            raise DataError(f"{where}: {number} tokens do not fit training.seq_len = {self.seq_len}; see dataset.too_long")
        self.pending = np.concatenate([self.pending, marked]) if len(self.pending) else marked
        self.pending_lines = np.concatenate([self.pending_lines, lines]) if len(self.pending_lines) else lines
        if self.too_long == "split":
            while len(self.pending) - 1 > self.seq_len:
                self._write(self.seq_len, file, digest)
        elif len(self.pending) - 1 > self.seq_len:
            self.pending, self.pending_lines = self.pending[: self.seq_len + 1], self.pending_lines[: self.seq_len + 1]
            digest = None  # documents that are equal once they are cut stay together
        if is_last:
            self._end(file, digest)

    def _end(self, file: int, digest: int | None) -> None:
        self.facts.num_read += 1
        for bit, name in REMARKS if self.remarks else ():
            if self.remarks & bit:
                self.facts.count(name, file, self.first_line)
        is_long = self.num_seen - 1 > self.seq_len
        if is_long:
            self.facts.count("long", file, self.first_line)
        if not (is_long and self.too_long == "drop"):
            if len(self.pending) > 1:
                self._write(len(self.pending) - 1, file, digest)
            self._store(self.pending)
            if len(self.documents) == self.num_before:
                self.facts.count("untrained", file, self.first_line)
        self.pending, self.pending_lines, self.num_seen, self.first_line, self.remarks = self.pending[:0], self.pending_lines[:0], 0, 0, 0

    def _write(self, num_labels: int, file: int, digest: int | None) -> None:
        """Make a document of the first pending tokens, where any of its labels is trained; the token that is its last label stays pending."""
        piece = self.pending[: num_labels + 1]
        if num_trained := int(np.count_nonzero(read_trained(piece[1:]))):
            line = int(self.pending_lines[0])
            self.documents.extend((self.num_tokens, num_labels, num_trained, file, line, digest_tokens(piece) if digest is None else digest))
        self._store(piece[:-1])
        self.pending, self.pending_lines = self.pending[num_labels:], self.pending_lines[num_labels:]

    def _store(self, marked: np.ndarray) -> None:
        content = marked.tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.num_tokens += len(marked)


def build_source(folder: Path, source: OpenedSource, reading: Reading, seq_len: int, too_long: str, num_workers: int) -> None:
    """Write the index of a source into an empty folder.

    Raises:
        DataError: a bad row (with file and line), no document, or no trained token at all.
    """
    facts = Facts(reading.format)
    answers = work_on_all(reading, plan_tasks(source, source.rows()), num_workers)
    with open(folder / TOKENS_FILE, "wb", buffering=WRITE_BYTES) as file, closing(answers):
        builder = Builder(file, source, seq_len, too_long, facts)
        edge = 0
        for task, answer in answers:
            if isinstance(task, Rows):
                assert isinstance(answer, Documents)
                add_documents(builder, task, answer)
            else:
                assert isinstance(answer, TextPart)
                edge = add_part(builder, task, answer, edge, reading)
    check_facts(facts, source, reading, seq_len, num_documents=len(builder.documents))
    facts.tokens_digest = builder.digest.hexdigest()
    np.save(folder / DOCUMENTS_FILE, np.frombuffer(builder.documents, dtype=np.int64).reshape(-1, len(COLUMNS)).T.copy())
    (folder / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")


def plan_tasks(source: OpenedSource, rows: Iterable[RawRow | RawText]) -> Iterator[Rows | Part]:
    """Tasks for workers: rows in groups, and parts of long texts with some of the text around them."""
    group, size = Rows([], [], [], []), 0
    before = ""
    held: RawText | None = None
    for row in rows:
        if isinstance(row, RawText):
            if held is not None:
                yield Part(before, held.text, row.text[:CONTEXT_CHARS], held.file, held.line, source.where(held.file, held.line), False)
                before = (before + held.text)[-CONTEXT_CHARS:]
            held = row
            if row.is_last:
                yield Part(before, row.text, "", row.file, row.line, source.where(row.file, row.line), True)
                before, held = "", None
            continue
        group.contents.append(row.content)
        group.files.append(row.file)
        group.lines.append(row.line)
        group.wheres.append(source.where(row.file, row.line))
        size += estimate_bytes(row.content)
        if size >= BYTES_PER_TASK or len(group.lines) >= ROWS_PER_TASK:
            yield group
            group, size = Rows([], [], [], []), 0
    if group.lines:
        yield group


def estimate_bytes(content: Any, levels: int = SIZED_LEVELS) -> int:
    """About how large a row or a value in it is, by its texts and numbers; what lies deeper than so many levels is not counted."""
    if isinstance(content, bytes | str):
        return len(content)
    if not levels or not content:
        return 0
    if isinstance(content, dict):
        return sum(estimate_bytes(value, levels - 1) for value in content.values())
    if isinstance(content, list):
        is_of_numbers = isinstance(content[0], int | float)
        return len(content) * BYTES_PER_NUMBER if is_of_numbers else sum(estimate_bytes(value, levels - 1) for value in content)
    return BYTES_PER_NUMBER


def add_documents(builder: Builder, task: Rows, answer: Documents) -> None:
    """Add what a worker made of a group of rows."""
    end = 0
    made = (column.tolist() for column in (answer.lengths, answer.remarks, answer.digests))
    for file, line, length, remarks, digest in zip(task.files, task.lines, *made, strict=True):
        builder.add(answer.marked[end : end + length], np.full(length, line, dtype=np.int64), file, line, remarks, digest=digest)
        end += length


def add_part(builder: Builder, part: Part, tokens: TextPart, edge: int, reading: Reading) -> int:
    """Add the tokens of one part of a text; the document begins and ends as the tokenizer's own.

    Args:
        edge: how far the last token of the part before reaches into this one, in characters.

    Returns:
        The same for the next part.
    """
    ids, lines, first = tokens.ids, tokens.lines, not part.before
    if not first and len(ids) and tokens.first_start != edge:
        builder.facts.count("seams", part.file, part.line)
    start_ids = reading.tokenizer.document_start_ids if first else []
    end_ids = reading.tokenizer.document_end_ids if part.is_last else []
    if reading.parse_special_tokens and end_ids == ids[-len(end_ids) :].tolist():
        end_ids = []  # the text ends with it already
    last_line = int(lines[-1]) if len(lines) else part.line
    lines = np.concatenate([np.full(len(start_ids), part.line), lines, np.full(len(end_ids), last_line)])
    marked = np.concatenate([start_ids, ids, end_ids]).astype(np.int32)
    builder.add(marked, lines, part.file, part.line, SPECIAL_TEXT if tokens.has_special_text else 0, part.is_last)
    return tokens.last_end if len(ids) else 0


def check_facts(facts: Facts, source: OpenedSource, reading: Reading, seq_len: int, num_documents: int) -> None:
    """Refuse data that cannot be meant; raises DataError."""
    if not facts.num_read:
        raise DataError(f"{source.name} holds no document")
    if not num_documents and facts.num_long == facts.num_read and not facts.num_untrained:
        raise DataError(f"{source.name}: all {facts.num_read} documents are longer than training.seq_len = {seq_len}; see dataset.too_long")
    if not num_documents:
        raise DataError(
            f"{source.name}: no token of {facts.num_read} documents is trained; look at the template, dataset.train_on and training.seq_len"
        )
    if facts.num_all_trained == facts.num_read:
        raise DataError(
            f"{source.name}: every token is trained, although dataset.train_on = {reading.train_on!r}: the chat template's generation tags "
            'enclose everything; mend them, or set dataset.train_on = "all"'
        )
