"""Talk with a model: a conversation whose words come as they are made."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tunelib.data.chat import ChatTemplate
from tunelib.errors import TunelibError
from tunelib.infer.generate import Stops, stream
from tunelib.infer.sample import Sampling
from tunelib.model.cache import KeyValues
from tunelib.model.decoder import Decoder

HELP = "/reset forgets what was said, /exit ends; so does Ctrl-D. Ctrl-C cuts an answer short."


class TextStream:
    """Turns tokens that come one by one into text, as soon as it is certain: a character may need several tokens, and so may a text that ends all."""

    def __init__(self, stops: Stops):
        self._stops = stops
        self._ids: list[int] = []
        self._length = 0

    def add(self, token: int) -> str:
        """The text that a new token makes certain."""
        self._ids.append(token)
        text = self._stops.text_of(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        begun = (len(stop) - cut for stop in self._stops.texts for cut in range(1, len(stop)) if text.endswith(stop[:-cut]))
        return self._take(text[: len(text) - max(begun, default=0)])

    def end(self) -> str:
        """The rest."""
        return self._take(self._stops.text_of(self._ids))

    def _take(self, text: str) -> str:
        new = text[self._length :]
        self._length = max(self._length, len(text))
        return new


class Conversation:
    """Turns of a user and a model, which reads of each turn only what is new.

    Args:
        stops: what ends an answer.
        max_new_tokens: of an answer.
        system: what the model is told first; empty for nothing.
    """

    def __init__(self, model: Decoder, template: ChatTemplate, stops: Stops, max_new_tokens: int, sampling: Sampling, system: str = ""):
        self._model, self._template, self._stops, self._max_new_tokens, self._sampling = model, template, stops, max_new_tokens, sampling
        self._system: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = list(self._system)
        self._cache = KeyValues(torch.zeros(1, dtype=torch.long, device=self._model.model.embed_tokens.weight.device), len(self._model.model.layers))
        self._read: list[int] = []

    def answer(self, text: str) -> Iterator[str]:
        """The answer to what the user says, piece by piece; one that is broken off counts as far as it came.

        Raises:
            DataError: the template refuses the conversation; ConfigError: it fills the model's context.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        prompt = self._template.encode_prompt(asked)
        differing = (place for place, (old, new) in enumerate(zip(self._read, prompt, strict=False)) if old != new)
        known = next(differing, min(len(self._read), len(prompt)))  # tokens that need not be read again
        self._cache.crop(min(known, len(prompt) - 1))
        pieces, ids, said = TextStream(self._stops), list(prompt), ""
        try:
            for _, token in stream(self._model, [prompt], self._max_new_tokens, self._stops, self._sampling, self._cache):
                ids.append(token)
                piece = pieces.add(token)
                said += piece
                yield piece
            said += (rest := pieces.end())
            yield rest
        finally:
            self._read = ids[: self._cache.length]
            if len(ids) > len(prompt):
                self._messages = [*asked, {"role": "assistant", "content": said}]


def talk(conversation: Conversation, ask: Callable[[], str], write: Callable[[str], object]) -> None:
    """Talk until the user wants no more.

    Args:
        ask: gives the user's next line; raises EOFError where there is none.
        write: shows a piece of an answer at once.
    """
    write(HELP + "\n")
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            write("(forgotten)\n")
        elif text.startswith("/"):
            write(f"{text.split()[0]} is no command: {HELP}\n")
        elif text:
            try:
                for piece in conversation.answer(text):
                    write(piece)
            except KeyboardInterrupt:
                write(" …")
            except TunelibError as error:
                write(f"({error}; /reset begins anew)")
            write("\n")
