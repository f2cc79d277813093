"""From [dataset] to documents, in the two steps that training, the preview and every tool take: before and after the model is known.

Which tokens there are decides how large a new model's vocabulary is, so sources and template are found first; which ids a model
takes is checked when documents are made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunelib.config.schema import Dataset
from tunelib.data.chat import ChatTemplate, complete_tokens
from tunelib.data.index import (
    FoundSource,
    Index,
    build_index,
    choose_template,
    find_sources,
    held_out_source,
    list_sources,
    resolve_cache_folder,
    split_held_out,
)
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


def find_words(section: Dataset, tokenizer_folder: Path, resize_embeddings: bool) -> Words:
    """Open the tokenizer and the sources; nothing is tokenised yet.

    Args:
        resize_embeddings: special tokens of the template that the tokenizer lacks are added to it, instead of an error.

    Raises:
        DataError: a tokenizer, source or template that is not there, cannot be read, or does not fit the others.
    """
    tokenizer = Tokenizer(tokenizer_folder)
    sources = find_sources(list_sources(section), resolve_cache_folder(section))
    template = choose_template(sources, section, tokenizer)
    if template is not None:
        tokenizer, template = complete_tokens(tokenizer, template, resize_embeddings)
    return Words(tokenizer, sources, template)


def build_documents(
    words: Words,
    section: Dataset,
    seq_len: int,
    vocab_size: int,
    *,
    held_out_path: str = "",
    held_out_split: str = "",
    held_out_fraction: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    num_workers: int | None = None,
) -> tuple[Index, Index | None]:
    """The documents to train on, and those held out, where any are.

    Args:
        seq_len: the most positions that a row can hold.
        vocab_size: the model's.
        say: told of what takes long.
        num_workers: processes that tokenise; None takes as many as there are cores and the data is worth.

    Raises:
        DataError: what a row, a document or the whole of them has wrong.
    """
    index = build_index(words.sources, section, seq_len, words.tokenizer, words.template, vocab_size, say, num_workers)
    if held_out_fraction is not None:
        return split_held_out(index, held_out_fraction)
    if not held_out_path and not held_out_split:
        return index, None
    sources = find_sources([held_out_source(section, held_out_path, held_out_split)], resolve_cache_folder(section))
    return index, build_index(sources, section, seq_len, words.tokenizer, words.template, vocab_size, say, num_workers)
