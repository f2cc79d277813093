"""Answers, token by token: with a cache of keys and values, for a whole model on one device; plain and greedy, on any layout that training runs on.

B rows, S tokens of the longest prompt.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunelib.data.chat import ChatTemplate
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError, DataError
from tunelib.infer.sample import Sampling, choose
from tunelib.model.cache import KeyValues
from tunelib.model.decoder import Decoder
from tunelib.parallel.fsdp import forward_only
from tunelib.parallel.reduce import from_main


@dataclass(frozen=True)
class Stops:
    """What ends an answer: a token, which is not part of it, or a text, from which on it is cut.

    Attributes:
        ids: tokens, such as the end of a turn.
        texts: as they may come about over several tokens; need the tokenizer.
    """

    ids: Collection[int] = ()
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if "" in self.texts:
            raise ConfigError("an empty text to stop at would end every answer at its beginning: leave it out")

    @functools.cached_property
    def all_ids(self) -> frozenset[int]:
        """The tokens, with those that a text names: special ones are in no answer's text."""
        special = {text: self.tokenizer.id_of(text) for text in self.tokenizer.special_texts} if self.tokenizer else {}
        return frozenset(self.ids) | {token for text in self.texts if (token := special.get(text)) is not None}

    def end(self, new_ids: Sequence[int]) -> bool:
        """Whether an answer ends with the newest of its tokens."""
        if new_ids[-1] in self.all_ids:
            return True
        if not self.texts:
            return False
        assert self.tokenizer is not None
        text = self.tokenizer.decode(list(new_ids))
        return any(stop in text for stop in self.texts)

    def text_of(self, new_ids: Sequence[int]) -> str:
        """An answer as text, without what ends it."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(list(new_ids[:-1] if new_ids and new_ids[-1] in self.all_ids else new_ids))
        return text[: min((place for stop in self.texts if (place := text.find(stop)) >= 0), default=len(text))]


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Stops | None = None, sampling: Sampling | None = None
) -> list[list[int]]:
    """Answers to prompts, all made together, each as if it were alone: for each its new ids, with the one that ended it, if one did.

    See `stream`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_new_tokens, stops, sampling):
        answers[row].append(token)
    return answers


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Stops | None = None,
    sampling: Sampling | None = None,
    cache: KeyValues | None = None,
) -> Iterator[tuple[int, int]]:
    """The tokens of answers as they are made: the prompt's number and the token.

    Args:
        model: whole, on one device.
        prompts: B lists of token ids, none of them empty.
        max_new_tokens: at least 1; an answer may also end because the context is full.
        cache: of one prompt, whose first tokens it has read; it reads the rest, and all of the answer but its last token.

    Raises:
        ConfigError: a prompt that fills the model's context.
    """
    stops, sampling = stops or Stops(), sampling or Sampling()
    context = model.config.max_position_embeddings
    longest = max(map(len, prompts), default=0)
    if longest >= context:
        raise ConfigError(f"the prompt has {longest:,} tokens, and the model's context is {context:,}: shorten it")
    device = model.model.embed_tokens.weight.device
    if cache is None:
        cache = KeyValues(torch.tensor([longest - len(prompt) for prompt in prompts], device=device), model.config.num_hidden_layers)
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)[:, cache.length :]  # (B, S)
    answers: list[list[int]] = [[] for _ in prompts]
    rows, live = list(range(len(prompts))), set(range(len(prompts)))  # rows of the cache: answers that have ended stay until half have
    generators = sampling.generators(len(prompts))
    while live:
        chosen = choose(_next_logits(model, tokens, cache), sampling, [generators[row] for row in rows])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in live:
                answers[row].append(token)
                if len(answers[row]) == max_new_tokens or len(prompts[row]) + len(answers[row]) == context or stops.end(answers[row]):
                    live.remove(row)
                yield row, token
        if 0 < 2 * len(live) <= len(rows):
            kept = torch.tensor([place for place, row in enumerate(rows) if row in live], device=device)
            cache.keep_rows(kept)
            rows, chosen = [rows[place] for place in kept.tolist()], chosen[kept]
        tokens = chosen[:, None]


def _next_logits(model: Decoder, tokens: Tensor, cache: KeyValues) -> Tensor:
    """(B, S) → (B, V): of what follows the last token."""
    hidden = model.model(tokens, cache.positions(tokens.shape[1]), cache)
    return model.logits_of(hidden[:, -1])


def generate_greedy(model: Decoder, prompt: list[int], max_new_tokens: int, stop_ids: Collection[int], device: torch.device) -> list[int]:
    """The most probable continuation, token by token, without a cache. Collective: every rank follows rank 0's choice.

    Args:
        prompt: token ids, at least one.
        stop_ids: ids that end the answer; the one met is not part of it.
    """
    ids = list(prompt)
    with forward_only(model):
        for _ in range(max_new_tokens):
            tokens = torch.tensor([ids], device=device)  # (1, S)
            positions = torch.arange(len(ids), device=device)[None]
            logits = model(tokens, positions, (len(ids),))  # (1, S, V)
            chosen = from_main(int(logits[0, -1].argmax()))
            if chosen in stop_ids:
                break
            ids.append(chosen)
    return ids[len(prompt) :]


def encode_prompts(prompts: Collection[str], tokenizer: Tokenizer, template: ChatTemplate | None, system: str = "") -> list[list[int]]:
    """Prompts as tokens: each the one message of a user, or, without a template, running text to go on with.

    Args:
        system: what the model is told before each.

    Raises:
        DataError: the template refuses one, one becomes no token at all, or there is no template for what the model is told before.
    """
    if system and template is None:
        raise DataError(f"there is no chat template that could tell the model {system!r}: put it into the prompt")
    before = [{"role": "system", "content": system}] if system else []
    encoded = []
    for prompt in prompts:
        if template is not None:
            ids = template.encode_prompt([*before, {"role": "user", "content": prompt}])
        else:
            ids = tokenizer.encode(prompt, add_special_tokens=True).ids
        if not ids:
            raise DataError(f"the prompt {prompt!r} is no token at all; there is nothing to go on with")
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: Decoder, prompts: list[list[int]], tokenizer: Tokenizer, stop_ids: Collection[int], max_new_tokens: int, device: torch.device
) -> list[str]:
    """Greedy answers, as text, to what `encode_prompts` made; with a cache where the model is whole. Collective."""
    stops = Stops(stop_ids, tokenizer=tokenizer)
    longest = max(map(len, prompts), default=0)
    if prompts and _is_whole(model) and longest + max_new_tokens <= model.config.max_position_embeddings:
        with forward_only(model):
            answers = generate(model, prompts, max_new_tokens, stops)
    else:
        answers = [generate_greedy(model, prompt, max_new_tokens, stop_ids, device) for prompt in prompts]
    return [stops.text_of(answer) for answer in answers]


def _is_whole(model: Decoder) -> bool:
    """Whether all of it is in this process, no part sharded or split."""
    return model.pipeline is None and not any(isinstance(parameter, DTensor) for parameter in model.parameters())
