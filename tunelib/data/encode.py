"""Rows to documents: token ids, with a mark on those that are trained as labels.

A document is one int32 array: the id t where the token is trained, ~t (which is negative) where it is not. `read_ids` and
`read_trained` take the two apart.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunelib.config.schema import Columns
from tunelib.data.chat import ChatTemplate
from tunelib.data.shapes import Conversation, Row, read_continuation, read_conversation, read_text, read_tokens
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError

# What a person should hear of a document: bits of `Document.remarks`.
SPECIAL_TEXT, NO_STOP, DOUBLE_BOS, ALL_TRAINED, TOOLS_UNSEEN, SAME_ROLE = 1, 2, 4, 8, 16, 32


@dataclass(frozen=True)
class Reading:
    """Everything that decides how the rows of one source become documents; small, since worker processes are told of it.

    Attributes:
        tokenizer: quicker sent to a worker process than opened there.
        template: name and source of the chat template; None where none is used.
        format: "chat", "prompt_completion", "instruct", "text" or "tokens".
        vocab_size: the model's; a larger id is an error.
    """

    tokenizer: Tokenizer
    template: tuple[str, str] | None
    format: str
    columns: Columns
    train_on: str
    parse_special_tokens: bool
    vocab_size: int


@dataclass(frozen=True)
class Document:
    """A document as one marked array (see above), and its remarks."""

    marked: np.ndarray
    remarks: int


@dataclass(frozen=True)
class TextPart:
    """Tokens that begin in one part of a long text, and the line of each; the edges say where the first begins and the last ends.

    Attributes:
        ids: N token ids; ``lines`` beside them.
        first_start: characters from the part's beginning to the first token; 0 where there is none.
        last_end: characters from the part's end to the end of the last token; 0 where there is none.
        has_special_text: the part spells out special tokens, which were read as text.
    """

    ids: np.ndarray
    lines: np.ndarray
    first_start: int
    last_end: int
    has_special_text: bool


class Encoder:
    """Makes documents of rows, as one `Reading` says."""

    def __init__(self, reading: Reading):
        self.reading = reading
        self.tokenizer = reading.tokenizer
        self.template = ChatTemplate(self.tokenizer, *reading.template) if reading.template else None
        self._bos = self.tokenizer.id_of(self.tokenizer.special.get("bos_token", ""))
        ends = {self.tokenizer.id_of(text) for text in self.tokenizer.special_texts} | self.tokenizer.stop_ids
        self._end_ids = frozenset(end for end in ends if end is not None)

    def encode(self, row: Row, where: str) -> Document:
        """The document of a row.

        Raises:
            DataError: the row is not of the format, the template refuses it, or an id is not in the model's vocabulary.
        """
        try:
            return self._encode(row, where)
        except RecursionError:
            raise DataError(f"{where}: lists and objects are nested too deeply to be read") from None

    def _encode(self, row: Row, where: str) -> Document:
        format, columns, plain = self.reading.format, self.reading.columns, not self.reading.parse_special_tokens
        remarks = 0
        if format == "tokens":
            listed, marks = read_tokens(row, columns, where)
            return Document(self._mark(listed, np.array(marks, dtype=bool), where), 0)
        if format == "text":
            text = read_text(row, columns, where)
            ids = self.tokenizer.encode_document(text, parse_special_tokens=not plain).ids
            trained = np.ones(len(ids), dtype=bool)
            remarks = SPECIAL_TEXT if plain and self.tokenizer.find_special(text) else 0
        elif self.template is None:
            joined = read_continuation(row, columns, where)
            text = joined.prompt + joined.completion
            encoded = self.tokenizer.encode_document(text, parse_special_tokens=not plain)
            ids, offsets = encoded.ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
            trained = (offsets[:, 1] > len(joined.prompt)) | (offsets[:, 0] >= len(text)) | (self.reading.train_on == "all")
            remarks = SPECIAL_TEXT if plain and self.tokenizer.find_special(text) else 0
        else:
            ids, trained, remarks = self._encode_conversation(row, self.template, where)
        if len(ids) > 1 and ids[0] == ids[1] == self._bos:
            remarks |= DOUBLE_BOS
        return Document(self._mark(ids, trained, where), remarks)

    def encode_part(self, before: str, text: str, after: str, line: int, where: str) -> TextPart:
        """The tokens that begin in a part of a long text, as the whole text's would be.

        Args:
            before: some of the text before the part, and ``after`` of that after it: enough for the tokens at the part's edges.
            line: the line on which the part begins.
        """
        if self.reading.format != "text":
            raise DataError(
                f"{where}: a plain text file, though the data is read as {self.reading.format!r}; leave it out with a pattern such as "
                "folder/*.jsonl, or make it a source of its own with [[dataset.mix]]"
            )
        special = () if not self.reading.parse_special_tokens else None
        encoded = self.tokenizer.encode(before + text + after, add_special_tokens=False, special=special)
        offsets = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2) - len(before)
        own = (offsets[:, 0] >= 0) & (offsets[:, 0] < len(text))
        ids, starts = np.array(encoded.ids, dtype=np.int64)[own], offsets[own, 0]
        breaks = np.array([place for place, character in enumerate(text) if character == "\n"], dtype=np.int64)
        lines = line + np.searchsorted(breaks, starts)
        self._check_vocabulary(ids, where)
        edges = (int(starts[0]), int(offsets[own, 1].max()) - len(text)) if len(ids) else (0, 0)
        return TextPart(ids.astype(np.int32), lines, *edges, has_special_text=special is not None and bool(self.tokenizer.find_special(text)))

    def _encode_conversation(self, row: Row, template: ChatTemplate, where: str) -> tuple[list[int], np.ndarray, int]:
        conversation = read_conversation(row, self.reading.format, self.reading.columns, where)
        wanted = self._choose_answers(conversation, where)
        messages, tools = conversation.messages, conversation.tools
        by_message = len(set(wanted.values())) > 1
        try:
            encoded = template.encode(messages, tools, parse_special_tokens=self.reading.parse_special_tokens, by_message=by_message)
            remarks = 0 if template.shows_tools(messages, tools) else TOOLS_UNSEEN
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if -1 in encoded.spoken and by_message:
            raise DataError(f"{where}: the chat template's generation tags do not mark each answer by itself, so none can be left out")
        trained = np.full(len(encoded.ids), self.reading.train_on == "all")
        for index, tokens in encoded.spoken.items():
            trained = trained | tokens if wanted.get(index, all(wanted.values())) else trained & ~tokens
        remarks |= SPECIAL_TEXT if encoded.has_special_text else 0
        if any(message["role"] == after["role"] != "tool" for message, after in itertools.pairwise(messages)):
            remarks |= SAME_ROLE
        if trained.any() and self._end_ids.isdisjoint(np.array(encoded.ids)[trained].tolist()):
            remarks |= NO_STOP
        if self.reading.train_on != "all" and trained[1:].all():
            remarks |= ALL_TRAINED
        return encoded.ids, trained, remarks

    def _choose_answers(self, conversation: Conversation, where: str) -> dict[int, bool]:
        """Which of the assistant's messages are trained, as dataset.train_on and the messages' own flags say."""
        train_on, num_prompt = self.reading.train_on, conversation.num_prompt
        answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        wanted = {index: train_on == "all" or (index >= num_prompt and (train_on != "last" or index == answers[-1])) for index in answers}
        for index, flag in enumerate(conversation.flags):
            if index in wanted:
                wanted[index] = wanted[index] if flag is None else flag
            elif train_on == "all" and flag is False:
                raise DataError(f'{where}: message {index} is flagged not to be trained, which dataset.train_on = "all" can do for answers only')
        return wanted

    def _mark(self, ids: Sequence[int], trained: np.ndarray, where: str) -> np.ndarray:
        try:
            found = np.array(ids, dtype=np.int64)
        except OverflowError:
            raise DataError(f"{where}: {max(ids, key=abs)} is no token id; no vocabulary is that large") from None
        self._check_vocabulary(found, where)
        return np.where(trained, found, ~found).astype(np.int32)

    def _check_vocabulary(self, ids: np.ndarray, where: str) -> None:
        if len(ids) and ids.min() < 0:
            raise DataError(f"{where}: {ids.min()} is no token id; ids are not negative")
        if len(ids) and ids.max() >= self.reading.vocab_size:
            raise DataError(
                f"{where}: there is a token with the id {ids.max()}, but the model's vocabulary ends at {self.reading.vocab_size - 1}: "
                "model.tokenizer_path is not the model's own, or model.vocab_size is too small"
            )


def read_ids(marked: np.ndarray) -> np.ndarray:
    """The token ids of a marked array."""
    return np.where(marked < 0, ~marked, marked)


def read_trained(marked: np.ndarray) -> np.ndarray:
    """Which tokens of a marked array are trained as labels."""
    return marked >= 0
