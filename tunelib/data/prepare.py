"""From [dataset] to documents, in the two steps that training, the preview and every tool take: before and after the model is known.

Which tokens there are decides how large a new model's vocabulary is, so sources and template are found first; which ids a model
takes is checked when documents are made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunelib.config.schema import Dataset
from tunelib.data.chat import ChatTemplate, complete_tokens
from tunelib.data.encode import Encoder
from tunelib.data.index import (
    FoundSource,
    Index,
    build_index,
    choose_template,
    describe_reading,
    find_sources,
    held_out_source,
    list_sources,
    resolve_cache_folder,
    see_format,
    split_held_out,
)
from tunelib.data.loader import Share, TrainData
from tunelib.data.sources import open_stream
from tunelib.data.stream import StreamData, SumOverRanks
from tunelib.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Words:
    """The tokenizer, and what it is to read: the sources with the format of their rows, and the template of their conversations."""

    tokenizer: Tokenizer
    sources: list[FoundSource]
    template: ChatTemplate | None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's, and what the template ends one with."""
        return self.tokenizer.stop_ids | (self.template.end_ids() if self.template else frozenset())


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out: files of their own, a split of the Hub data set, a share of all, or none."""

    path: str = ""
    split: str = ""
    fraction: float | None = None


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
    return Words(tokenizer, sources, template)


def build_documents(
    words: Words,
    section: Dataset,
    seq_len: int,
    vocab_size: int,
    held_out: HeldOut,
    say: Callable[[str], None] = lambda text: None,
    num_workers: int | None = None,
) -> tuple[Index | None, Index | None]:
    """The documents to train on, None for those of a stream; and those held out, where any are.

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
        return split_held_out(index, held_out.fraction)
    if not held_out.path and not held_out.split:
        return index, None
    return index, build(find_sources([held_out_source(section, held_out.path, held_out.split)], resolve_cache_folder(section)))


def build_train_data(
    words: Words,
    section: Dataset,
    index: Index | None,
    vocab_size: int,
    batches: Batches,
    sum_over_ranks: SumOverRanks = list,
) -> TrainData | StreamData:
    """The training rows of every step: of the index, or of the stream where there is none.

    Args:
        vocab_size: the model's.
        sum_over_ranks: sums counts over the data ranks; collective, and needed by a stream alone.
    """
    if index is not None:
        return TrainData(index, batches.seq_len, section.packing, batches.seed, batches.global_size, batches.share, section.last_batch)
    found = words.sources[0]
    reading, too_long, fingerprint = describe_reading(found, section, batches.seq_len, words.tokenizer, words.template, vocab_size)
    order = (batches.seq_len, too_long, section.packing, batches.seed, batches.global_size, batches.share)
    return StreamData(found, Encoder(reading), fingerprint, *order, sum_over_ranks)
