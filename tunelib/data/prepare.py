"""From [dataset] to documents, in the two steps that training, the preview and every tool take: before and after the model is known.

Which tokens there are decides how large a new model's vocabulary is, so sources and template are found first; which ids a model
takes is checked when documents are made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunelib.config.schema import Dataset, Source
from tunelib.data.chat import ChatTemplate, complete_tokens
from tunelib.data.index import (
    FoundSource,
    Index,
    build_index,
    choose_template,
    describe_reading,
    find_sources,
    list_sources,
    resolve_cache_folder,
    see_format,
    split_held_out,
)
from tunelib.data.loader import Share, TrainData
from tunelib.data.sources import open_source, open_stream
from tunelib.data.stream import Ranks, StreamData
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError


@dataclass(frozen=True)
class Words:
    """The tokenizer, and what it is to read: the sources with the format of their rows, and the template of their conversations.

    ``may_add``: special tokens that it lacked were to be added.
    """

    tokenizer: Tokenizer
    sources: list[FoundSource]
    template: ChatTemplate | None
    may_add: bool = False

    @property
    def notes(self) -> list[str]:
        """What a person should know of tokenizer and template."""
        added = f"{', '.join(self.tokenizer.added)} added to the tokenizer" if self.tokenizer.added else ""
        idle = "model.resize_embeddings: the tokenizer has every token that the template writes" if self.may_add and not added else ""
        inside = ""
        if self.template is not None and self.template.ends_inside_a_token():
            inside = (
                f"warning: the generation prompt of {self.template.name} ends inside a token: in use the model sees other tokens than in training; "
                "end it without white space"
            )
        return [note for note in (added, idle, inside) if note]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and what the template ends one with."""
        return self.tokenizer.stop_ids | (self.template.end_ids() if self.template else frozenset())


def raise_error(error: BaseException | None) -> None:
    """What agreeing is for one process."""
    if error is not None:
        raise error


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: files of their own, a split of the Hub data set, a share of all, or none."""

    path: str = ""
    split: str = ""
    fraction: float | None = None


ALONE = Ranks(agree=raise_error, gather=lambda value: [value])
"""One process that reads by itself."""


@dataclass(frozen=True)
class Batches:
    """What a batch is: ``global_size`` rows of ``seq_len`` positions a step, in an order that follows from ``seed``; this rank's ``share``."""

    seq_len: int
    global_size: int
    seed: int
    share: Share


def find_words(section: Dataset, tokenizer_folder: Path, resize_embeddings: bool) -> Words:
    """Open the tokenizer and the sources; nothing is tokenised yet.

    Args:
        resize_embeddings: special tokens of the template that the tokenizer lacks are added to it, instead of an error.

    Raises:
        DataError: a tokenizer, source or template that is not there, cannot be read, or does not fit the others.
    """
    tokenizer = Tokenizer(tokenizer_folder)
    listed, cache_folder = list_sources(section), resolve_cache_folder(section)
    sources = [see_format(open_stream(section), section)] if section.streaming else find_sources(listed, cache_folder)
    template = choose_template(sources, section, tokenizer)
    if template is not None:
        tokenizer, template = complete_tokens(tokenizer, template, resize_embeddings)
    return Words(tokenizer, sources, template, resize_embeddings)


@dataclass(frozen=True)
class Documents:
    """The documents to train on, None for those of a stream; and those held out, where any are."""

    train: Index | None
    held_out: Index | None

    @property
    def notes(self) -> list[str]:
        """What a person should know of them."""
        notes = self.train.notes if self.train else []
        if self.held_out is None:
            return notes
        if self.train is None or self.held_out.sources is not self.train.sources:
            notes += [f"held out: {note}" for note in self.held_out.notes]
        notes.append(f"{len(self.held_out):,} documents held out")
        if self.train is not None and (shared := int(np.isin(self.held_out.digests, self.train.digests).sum())):
            notes.append(f"warning: {shared:,} of the {len(self.held_out):,} held-out documents are trained on too: validation tells little")
        return notes


def build_documents(
    words: Words,
    section: Dataset,
    seq_len: int,
    vocab_size: int,
    held_out: HeldOut,
    say: Callable[[str], None] = lambda text: None,
    num_workers: int | None = None,
) -> Documents:
    """The documents to train on and those held out, from the cache or made now.

    Args:
        seq_len: the most positions that a row can hold.
        vocab_size: the model's.
        say: told of what takes long.
        num_workers: processes that tokenise; None takes as many as there are cores and the data is worth.

    Raises:
        DataError: what a row, a document or the whole of them has wrong.
    """

    def build(sources: list[FoundSource]) -> Index:
        return build_index(sources, section, seq_len, words.tokenizer, words.template, vocab_size, say, num_workers)

    index = None if section.streaming else build(words.sources)
    if index is not None and held_out.fraction is not None:
        return Documents(*split_held_out(index, held_out.fraction))
    if not held_out.path and not held_out.split:
        return Documents(index, None)
    return Documents(index, build([find_held_out(section, held_out)]))


def find_held_out(section: Dataset, held_out: HeldOut) -> FoundSource:
    """The held-out files or split, read as [dataset] says; beside a mix, as the first of its tables that fits.

    Raises:
        DataError: the source is not there, or its first row fits none.
    """
    readings = [(source.format, source.columns) for source in section.mix] or [(section.format, section.columns)]
    if held_out.split:
        source = Source(hub=section.hub, subset=section.subset, revision=section.revision, split=held_out.split)
    else:
        source = Source(path=held_out.path)
    opened = open_source(source, resolve_cache_folder(section))
    problems = []
    for format, columns in dict.fromkeys([*readings, (Source().format, Source().columns)] if section.mix else readings):
        try:
            return see_format(opened, Source(format=format, columns=columns))
        except DataError as error:
            problems.append(error)
    raise problems[0]


def build_train_data(
    words: Words,
    section: Dataset,
    index: Index | None,
    vocab_size: int,
    batches: Batches,
    ranks: Ranks,
) -> TrainData | StreamData:
    """The training rows of every step: of the index, or of the stream where there is none.

    Args:
        vocab_size: the model's.
        ranks: those that read a stream together.
    """
    if index is not None:
        return TrainData(index, batches.seq_len, section.packing, batches.seed, batches.global_size, batches.share, section.last_batch)
    found = words.sources[0]
    reading, too_long, fingerprint = describe_reading(found, section, batches.seq_len, words.tokenizer, words.template, vocab_size)
    order = (batches.seq_len, too_long, section.packing, batches.seed, batches.global_size, batches.share)
    return StreamData(found, reading, fingerprint, *order, ranks)
