"""What a run would train on, for people's eyes: figures of all documents, and rows with their trained tokens set off."""

import itertools
from collections.abc import Iterator

import numpy as np

from tunelib.data.encode import read_ids, read_trained
from tunelib.data.index import Index
from tunelib.data.loader import TrainData
from tunelib.data.prepare import Words
from tunelib.data.shapes import read_conversation
from tunelib.data.sources import RawRow, parse_row
from tunelib.data.tokenizer import Tokenizer

COLOURED, PLAIN = ("\033[32m", "\033[0m"), ("⟦", "⟧")
"""What stands around trained text: on a terminal, and elsewhere."""
BAR_WIDTH = 40


def describe_all(data: TrainData, notes: list[str]) -> Iterator[str]:
    """Figures: documents, tokens, share of trained tokens, a histogram of lengths; and the notes."""
    index = data.index
    tokens, trained = int(index.lengths.sum()), int(index.num_trained.sum())
    yield f"{len(index):,} documents, {tokens:,} tokens, {trained / tokens:.1%} of them trained"
    yield from (f"  {note}" for note in notes)
    yield "length in tokens (trained tokens beside it)"
    borders = [0, *itertools.takewhile(lambda border: border < data.seq_len, (1 << power for power in range(4, 40))), data.seq_len]
    counts = [int(((index.lengths > low) & (index.lengths <= high)).sum()) for low, high in itertools.pairwise(borders)]
    for (low, high), count in zip(itertools.pairwise(borders), counts, strict=True):
        if count:
            own = index.num_trained[(index.lengths > low) & (index.lengths <= high)]
            bar = "█" * max(1, round(BAR_WIDTH * count / max(counts)))
            yield f"  {low + 1:>7,} – {high:<7,} {bar:{BAR_WIDTH}} {count:,} ({own.mean():,.0f})"


def show_rendering(words: Words) -> Iterator[str]:
    """What the template makes of the first conversation."""
    for source in words.sources:
        first = next(source.opened.rows())
        if words.template is None or not isinstance(first, RawRow) or source.format in ("text", "tokens"):
            continue
        where = source.opened.where(first.file, first.line)
        conversation = read_conversation(parse_row(first.content, where), source.format, source.columns, where)
        yield f"── {where}, as the chat template of {words.template.name} renders it"
        yield words.template.render(conversation.messages, conversation.tools)
        return


def show_row(
    index: Index, documents: np.ndarray, number: int, epoch: int, data: TrainData, tokenizer: Tokenizer, marks: tuple[str, str]
) -> Iterator[str]:
    """A row: its documents with file and line, and their text with the trained part between ``marks``."""
    tokens, trained = int(index.lengths[documents].sum()), int(index.num_trained[documents].sum())
    width = data.seq_len if data.packing else tokens
    yield f"══ row {number}, epoch {epoch}: {len(documents)} documents, {tokens:,} of {width:,} tokens, {trained:,} trained"
    for document in documents.tolist():
        yield f"── {index.where(document)}: {index.lengths[document]:,} tokens, {index.num_trained[document]:,} trained"
        yield show_tokens(index.marked(document), tokenizer, marks)


def show_tokens(marked: np.ndarray, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    """The text of marked tokens, special ones included, with ``marks`` around what is trained; the first token is never a label."""
    ids, trained = read_ids(marked).tolist(), read_trained(marked)
    trained[:1] = False
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    text, shown = "", ""
    for start, end in itertools.pairwise(borders):
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False)
        piece = whole.removeprefix(text) if whole.startswith(text) else tokenizer.decode(ids[start:end], skip_special_tokens=False)
        shown += f"{marks[0]}{piece}{marks[1]}" if trained[start] else piece
        text = whole
    return shown
