"""The index: every document's tokens, once, memory-mapped, and what a run must know of them before it starts.

A *document* here is what stands in one row without being cut: n + 1 tokens that make n positions, since labels are shifted
where documents become rows. The index of a source is made once and kept in the cache, under a name that follows from everything
that decides its documents; several processes that want the same one wait for the first.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tunelib.config.schema import FORMAT_COLUMNS, Columns, Dataset, MixedSource, Source
from tunelib.data.build import COLUMNS, CONTEXT_CHARS, DOCUMENTS_FILE, FACTS_FILE, TOKENS_FILE, Facts, build_source
from tunelib.data.chat import NO_TEMPLATE, ChatTemplate, find_template
from tunelib.data.encode import Reading
from tunelib.data.readers import TEXT_PART_CHARS
from tunelib.data.shapes import detect_format
from tunelib.data.sources import OpenedSource, RawText, open_source, parse_row
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import CheckpointError, DataError
from tunelib.files import (
    MANIFEST,
    commit_folder,
    crc32_of,
    describe_files,
    make_staging,
    read_json,
    read_manifest,
    remove_folder,
    wait_for_lock,
)

INDEX_VERSION = 3
"""To be raised whenever the same settings make other documents: older indexes are then not used."""
CONVERSATIONS = ("chat", "instruct")
"""Formats that need a chat template; prompts and completions take one where there is one."""
BYTES_PER_WORKER = 1 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class FoundSource:
    """A source that is there, and the format of its rows; ``why`` it was seen, or ""."""

    opened: OpenedSource
    format: str
    why: str
    columns: Columns
    weight: float | None = None
    repeats: float | None = None


@dataclass(frozen=True)
class IndexedSource:
    """The documents of one source on disk: ``marked`` tokens end to end, as in `data/encode.py`, and how they came to be."""

    found: FoundSource
    marked: np.ndarray
    facts: Facts
    fingerprint: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        return describe_facts(self.found, self.facts, self.fingerprint["training.seq_len"], self.fingerprint["dataset.too_long"])


@dataclass(frozen=True)
class Index:
    """The documents of all sources.

    Attributes:
        sources: in the order of the config.
        source: of each document, as its place in ``sources``.
        starts: where it begins in its source's tokens.
        lengths: its positions: its tokens less one.
        num_trained: its trained labels; at least one.
        files, lines: where it came from.
        digests: a hash of its tokens.
    """

    sources: tuple[IndexedSource, ...]
    source: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_trained: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def marked(self, document: int) -> np.ndarray:
        """The n + 1 tokens of a document, marked as in `data/encode.py`."""
        start = int(self.starts[document])
        return self.sources[self.source[document]].marked[start : start + int(self.lengths[document]) + 1]

    def read_row(self, documents: np.ndarray) -> list[np.ndarray]:
        """The marked tokens of several documents."""
        return [self.marked(document) for document in documents.tolist()]

    def where(self, document: int) -> str:
        """File and line of a document."""
        return self.sources[self.source[document]].found.opened.where(int(self.files[document]), int(self.lines[document]))

    def select(self, chosen: np.ndarray) -> "Index":
        """The same index with some of its documents."""
        return Index(self.sources, *(getattr(self, name)[chosen] for name in ("source", *COLUMNS)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name → digest or value of each thing that decides the documents."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [(f" of dataset.mix {number}", source) for number, source in enumerate(self.sources, start=1)]
        return {f"{name}{of}": value for of, source in parts for name, value in source.fingerprint.items()}

    @property
    def notes(self) -> list[str]:
        """What a person should know: the formats found, documents cut or left out, and what looks wrong."""
        return [note for source in self.sources for note in source.notes]


def resolve_cache_folder(section: Dataset) -> Path:
    """dataset.cache_folder, or its default."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.abspath(section.cache_folder or os.path.join(home, "tunelib")))


def list_sources(section: Dataset) -> tuple[Source, ...]:
    """The sources of [dataset]: those of its mix, or itself."""
    return section.mix or (section,)


def find_sources(sources: Sequence[Source], cache_folder: Path) -> list[FoundSource]:
    """Open sources and see which format their rows have.

    Raises:
        DataError: a source that is not there, is empty, or whose format cannot be told.
    """
    return [see_format(open_source(source, cache_folder), source) for source in sources]


def see_format(opened: OpenedSource, source: Source) -> FoundSource:
    """Look at the first row of an opened source, to know the format of its rows; raises DataError."""
    first = next(islice(opened.rows(), 1), None)
    if first is None:
        raise DataError(f"{opened.name} holds no document")
    where = opened.where(first.file, first.line)
    row = None if isinstance(first, RawText) else parse_row(first.content, where)
    if row is None:
        if source.format not in ("auto", "text"):
            raise DataError(f'{where}: a plain text file is no {source.format!r}; set dataset.format = "text", or give rows of JSON')
        format, why = "text", "a plain text file"
    elif source.format == "auto":
        format, columns = detect_format(row, source.columns, where)
        why = f"by {columns} of its first row"
    else:
        format, why = source.format, ""
    default = Columns()
    for name, value in vars(source.columns).items():
        if value == getattr(default, name):
            continue
        if name not in FORMAT_COLUMNS[format]:
            raise DataError(f"{where}: the data is {format!r}, for which dataset.columns.{name} has no effect; remove it, or set dataset.format")
        if row is not None and value not in row:
            raise DataError(f"{where}: no column {value!r} (dataset.columns.{name}) among {sorted(row)}; the first row must have each that is named")
    shares = {"weight": source.weight, "repeats": source.repeats} if isinstance(source, MixedSource) else {}
    return FoundSource(opened, format, why, source.columns, **shares)


def choose_template(found: Sequence[FoundSource], section: Dataset, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the conversations; None where there are none.

    Raises:
        DataError: there is none although one is needed, or a choice that these data have no use for.
    """
    needing = [source for source in found if source.format in CONVERSATIONS]
    taking = [source for source in found if source.format == "prompt_completion"]
    template = find_template(tokenizer, section.chat_template) if needing or taking else None
    if needing and template is None:
        absent = f"the tokenizer in {tokenizer.folder} has no chat template"
        cause = 'dataset.chat_template is "none"' if section.chat_template == NO_TEMPLATE else absent
        raise DataError(
            f'{needing[0].opened.name}: the data is {needing[0].format!r}, but {cause}: name one with dataset.chat_template, such as "chatml"'
        )
    if not needing and not taking:
        default = Dataset()
        without_effect = ["chat_template", "train_on"]
        if all(source.format == "tokens" for source in found):
            without_effect.append("parse_special_tokens")
        for name in without_effect:
            if getattr(section, name) != getattr(default, name):
                raise DataError(f"{found[0].opened.name}: the data is {found[0].format!r}, for which dataset.{name} has no effect; remove it")
    return template


def build_index(
    found: Sequence[FoundSource],
    section: Dataset,
    seq_len: int,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    vocab_size: int,
    say: Say = lambda text: None,
    num_workers: int | None = None,
) -> Index:
    """The documents of all sources, from the cache or made now.

    Args:
        seq_len: the most positions that a row can hold.
        vocab_size: the model's; a larger token id is an error.
        say: told of what takes long.
        num_workers: processes that tokenise; None takes as many as there are cores and the data is worth.

    Raises:
        DataError: a bad row (with file and line), no document, or no trained token at all.
    """
    sources = tuple(_index_source(source, section, seq_len, tokenizer, template, vocab_size, say, num_workers) for source in found)
    # Mapped, so that processes share them, and of what is not asked for, such as lines, nothing is read.
    documents = [np.asarray(np.load(folder / DOCUMENTS_FILE, mmap_mode="r")) for _, folder in sources]
    columns = documents[0] if len(documents) == 1 else np.concatenate(documents, axis=1)
    source = np.repeat(np.arange(len(sources), dtype=np.int16), [part.shape[1] for part in documents])
    return Index(tuple(indexed for indexed, _ in sources), source, **dict(zip(COLUMNS, columns, strict=True)))


def split_held_out(index: Index, fraction: float) -> tuple[Index, Index]:
    """The documents to train on, and those held out: chosen by a hash of each one's tokens, so that equal ones stay together.

    Raises:
        DataError: one of the two would be empty.
    """
    held_out = index.digests.astype(np.uint64) < np.uint64(fraction * 2**64)
    if held_out.all() or not held_out.any():
        left, advice = ("to train on", "smaller") if held_out.all() else ("held out", "larger")
        equal = "; equal documents, and pieces of one, stay together" if len(np.unique(index.digests)) < len(index) else ""
        raise DataError(
            f"validation.fraction = {fraction} of {len(index)} documents leaves none {left}{equal}: give a {advice} one, or files as validation.path"
        )
    return index.select(~held_out), index.select(held_out)


def describe_facts(found: FoundSource, facts: Facts, seq_len: int, too_long: str) -> list[str]:
    """What a person should know of a source, a line each."""
    name = found.opened.name
    done = {"truncate": "cut to the first", "split": "split into pieces of", "drop": "left out: longer than"}
    first = {number: f"first {found.opened.where(*place)}" for number, place in facts.examples.items()}
    lines = {
        f"read as {facts.format!r}, {found.why}": bool(found.why),
        f"{facts.num_long} documents {done.get(too_long)} {seq_len} tokens ({first.get('long')})": facts.num_long,
        f"{facts.num_untrained} documents left out: no token in them is trained ({first.get('untrained')})": facts.num_untrained,
        f"{facts.num_special_text} documents spell out special tokens, which are read as text; dataset.parse_special_tokens = true "
        f"reads them as tokens ({first.get('special_text')})": facts.num_special_text,
        f"warning: in {facts.num_no_stop} documents no end-of-turn token is trained: the model does not learn when to stop "
        f"({first.get('no_stop')})": facts.num_no_stop,
        f"warning: {facts.num_double_bos} documents begin with two begin tokens ({first.get('double_bos')})": facts.num_double_bos,
        f"warning: in {facts.num_all_trained} documents every token is trained, not only answers ({first.get('all_trained')})": facts.num_all_trained,
        f"warning: {facts.num_tools_unseen} documents have tools or calls of them that the chat template does not show "
        f"({first.get('tools_unseen')})": facts.num_tools_unseen,
        f"{facts.num_same_role} conversations in which somebody speaks twice in a row ({first.get('same_role')})": facts.num_same_role,
        f"{facts.num_seams} places where parts of a long text meet are tokenised differently from the whole ({first.get('seams')})": facts.num_seams,
    }
    return [f"{name}: {line}" for line, count in lines.items() if count] + list(found.opened.notes)


def resolve_too_long(choice: str, format: str) -> str:
    """What "auto" means for a format."""
    if choice == "auto":
        return "split" if format in ("text", "tokens") else "truncate"
    return choice


def describe_reading(
    found: FoundSource, section: Dataset, seq_len: int, tokenizer: Tokenizer, template: ChatTemplate | None, vocab_size: int
) -> tuple[Reading, str, dict[str, Any]]:
    """How a source's rows become documents, what happens to long ones, and name → value of everything that decides it."""
    if found.format in CONVERSATIONS and template is None:
        raise DataError(f"{found.opened.name}: the data is {found.format!r}, but what is trained on is not, so that there is no chat template for it")
    own_template = template if found.format not in ("text", "tokens") else None
    reading = Reading(
        tokenizer=tokenizer,
        template=(own_template.name, own_template.source) if own_template else None,
        format=found.format,
        columns=found.columns,
        train_on=section.train_on,
        parse_special_tokens=section.parse_special_tokens,
        vocab_size=vocab_size,
    )
    too_long = resolve_too_long(section.too_long, found.format)
    return (
        reading,
        too_long,
        {
            "content of the data": found.opened.digest,
            "tokenizer": tokenizer.digest if found.format != "tokens" else "",
            "chat template": hashlib.sha256(own_template.source.encode()).hexdigest()[:32] if own_template else "",
            "dataset.format": found.format,
            "dataset.train_on": section.train_on if found.format not in ("text", "tokens") else "",
            "dataset.parse_special_tokens": section.parse_special_tokens,
            "dataset.too_long": too_long,
            "dataset.columns": {name: getattr(found.columns, name) for name in FORMAT_COLUMNS[found.format]},
            "training.seq_len": seq_len,
            **({"dataset.revision": found.opened.revision} if found.opened.revision else {}),
        },
    )


def _index_source(
    found: FoundSource,
    section: Dataset,
    seq_len: int,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    vocab_size: int,
    say: Say,
    num_workers: int | None,
) -> tuple[IndexedSource, Path]:
    """A source's index and its folder in the cache, where it is made if it is not there."""
    reading, too_long, fingerprint = describe_reading(found, section, seq_len, tokenizer, template, vocab_size)
    stop_ids = sorted(tokenizer.stop_ids) if reading.template else []  # not in the tokenizer's digest; they end answers
    cache = resolve_cache_folder(section) / "index"
    versions = {
        "index": INDEX_VERSION,
        "tokenizers": tokenizers.__version__,
        "vocab_size": vocab_size,
        "stop_ids": stop_ids,
        "parts": [TEXT_PART_CHARS, CONTEXT_CHARS],
    }
    key = hashlib.sha256(json.dumps({**fingerprint, **versions}, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    workers = _resolve_num_workers(found.opened.size_bytes) if num_workers is None else num_workers
    try:
        if not _is_whole(folder):  # one that is whole stays so: nobody needs the lock to read it, nor the right to write
            begun = time.time()
            with (
                wait_for_lock(cache / f"{key}.lock", lambda: say(f"{found.opened.name}: waiting for another process that tokenises it")),
                _shared_failure(cache / f"{key}.failed", begun),
            ):
                if not _is_whole(folder):
                    remove_folder(folder)
                    if workers > 1:
                        say(f"{found.opened.name}: tokenising {found.opened.size_bytes / 1e6:.0f} MB with {workers} processes")
                    with _staging_of_own(folder) as staging:
                        build_source(staging, found.opened, reading, seq_len, too_long, workers)
                        found.opened.check_unchanged()
                        files = describe_files(staging, (TOKENS_FILE, DOCUMENTS_FILE, FACTS_FILE))
                        commit_folder(staging, folder, files, kind="index", source=found.opened.name)
    except OSError as error:
        raise DataError(f"dataset.cache_folder: {error.filename or cache} cannot be written: {error.strerror}; name another folder") from None
    facts = Facts(**read_json(folder / FACTS_FILE, DataError))
    marked = np.memmap(folder / TOKENS_FILE, dtype=np.int32, mode="r")
    return IndexedSource(found, marked, facts, fingerprint), folder


@contextlib.contextmanager
def _shared_failure(note: Path, begun: float) -> Iterator[None]:
    """Raise what another process met that began to build after this one had begun to wait: it would be met again, and take as long."""
    with contextlib.suppress(FileNotFoundError):
        if note.stat().st_mtime >= begun:
            raise DataError(note.read_text(encoding="utf-8"))
        note.unlink()
    try:
        yield
    except DataError as error:
        note.write_text(str(error), encoding="utf-8")
        raise


@contextlib.contextmanager
def _staging_of_own(folder: Path) -> Iterator[Path]:
    """An empty folder to build in, which goes away with what is in it where that fails."""
    staging = make_staging(folder)
    try:
        yield staging
    except BaseException:
        remove_folder(staging)
        raise


def _is_whole(folder: Path) -> bool:
    """Whether a finished index lies here: its files are as large as its manifest says, and any that changed later still has its checksum."""
    try:
        files, written_ns = read_manifest(folder)["files"], (folder / MANIFEST).stat().st_mtime_ns
        for name, entry in files.items():
            state = (folder / name).stat()
            if state.st_size != entry["size"] or (state.st_mtime_ns > written_ns and crc32_of(folder / name) != entry["crc32"]):
                return False
    except (CheckpointError, OSError):
        return False
    return True


def _resolve_num_workers(size_bytes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size_bytes // BYTES_PER_WORKER))
