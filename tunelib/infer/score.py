"""What a model thinks of texts: the log-probabilities of their last tokens, and what it would go on with.

Texts are documents of packed rows, which attention keeps apart: nothing is padded, and the head is computed where something is asked. Rows are
made before they are dealt out, so that the numbers do not depend on how many processes there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunelib.batch import IGNORED, Batch
from tunelib.infer.generate import Stops
from tunelib.model.decoder import Decoder
from tunelib.parallel.fsdp import forward_only
from tunelib.parallel.mesh import Layout
from tunelib.parallel.reduce import any_rank
from tunelib.parallel.runtime import StopSignal


class Interrupted(Exception):
    """Somebody wants the process to end; no process has gone on."""


@dataclass(frozen=True)
class Crew:
    """The processes that score together; each takes its part of the rows.

    Attributes:
        device: where this one computes.
        rank: which part this process takes; size: into how many the rows are dealt.
        gather: what each part has found, by rank. Collective.
        any_live: whether anything is left to do on any process. Collective.
        should_stop: whether a signal asks for the end, on any process. Collective; asked before every forward pass, or every batch of answers.
        renew: told of every forward pass: what is scored may take long, but no part of it.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    any_live: Callable[[bool], bool] = lambda live: live
    should_stop: Callable[[], bool] = lambda: False
    renew: Callable[[], None] = lambda: None


def build_crew(layout: Layout, device: torch.device, stop: StopSignal, renew: Callable[[], None]) -> Crew:
    """The processes of a training run.

    Args:
        renew: see `Crew`.
    """

    def should_stop() -> bool:
        renew()
        return any_rank((stop.received,), device)[0]

    def any_live(live: bool) -> bool:
        return any_rank((live,), device)[0]

    return Crew(device, layout.data_rank, layout.num_data_ranks, layout.gather_shares, any_live, should_stop, renew)


@dataclass(frozen=True)
class Text:
    """Tokens, of which the last ``num_asked`` (at least 1) are asked about."""

    ids: Sequence[int]
    num_asked: int


def score_texts(model: Decoder, texts: Sequence[Text], room: Callable[[int], int], crew: Crew) -> list[tuple[float, bool]]:
    """For each text the log-probability of its last tokens, in nats, and whether each of them is the most probable one. Collective.

    Args:
        room: how many positions a row may have whose longest text has so many.

    Raises:
        Interrupted: on every process.
    """
    rows = pack([len(text.ids) - 1 for text in texts], room)
    found: dict[int, tuple[float, bool]] = {}
    with forward_only(model):
        for row in deal_rows(rows, crew):
            if crew.should_stop():
                raise Interrupted
            found |= zip(row, _score_row(model, [texts[number] for number in row], crew.device), strict=True)
    together = {number: result for part in crew.gather(found) for number, result in part.items()}
    return [together[number] for number in range(len(texts))]


def pack(lengths: Sequence[int], room: Callable[[int], int]) -> list[list[int]]:
    """The numbers of texts, the longest first, in rows; a row has one text at least."""
    rows: list[list[int]] = []
    left = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not rows or lengths[number] > left:
            rows.append([])
            left = room(lengths[number])
        rows[-1].append(number)
        left -= lengths[number]
    return rows


def pack_padded(lengths: Sequence[int], room: Callable[[int], int]) -> list[list[int]]:
    """The same for texts that are padded to the longest of their row."""
    rows: list[list[int]] = []
    most = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not rows or len(rows[-1]) == most:
            rows.append([])
            most = max(1, room(lengths[number]) // lengths[number])
        rows[-1].append(number)
    return rows


def deal_rows(rows: list[list[int]], crew: Crew) -> list[list[int]]:
    """This process's rows. All get as many, since a forward pass may be collective: who would have none does another's again."""
    return [rows[min(first + crew.rank, len(rows) - 1)] for first in range(0, len(rows), crew.size)]


def _score_row(model: Decoder, texts: Sequence[Text], device: torch.device) -> list[tuple[float, bool]]:
    labels = [[IGNORED] * (len(text.ids) - 1 - text.num_asked) + list(text.ids[-text.num_asked :]) for text in texts]
    scores = _ask(model, [text.ids[:-1] for text in texts], labels, device)
    results = []
    for text, of_text in zip(texts, scores.split([text.num_asked for text in texts]), strict=True):
        results.append((of_text[:, 0].sum().item(), of_text[:, 1].long().tolist() == list(text.ids[-text.num_asked :])))
    return results


def _ask(model: Decoder, texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`tunelib.model.loss.token_scores` of texts, which become one row, in float64 on the CPU."""
    lengths = tuple(len(ids) for ids in texts)
    batch = Batch(
        torch.tensor([[token for ids in texts for token in ids]]),
        torch.tensor([[label for of_text in labels for label in of_text]]),
        torch.cat([torch.arange(length) for length in lengths])[None],
        lengths,
    ).to(device)
    return model(batch.tokens, batch.positions, batch.document_lengths, labels=batch.labels, score=True).double().cpu()


def continue_texts(
    model: Decoder, prompts: Sequence[Sequence[int]], room: Callable[[int], int], max_new_tokens: int, stops: Stops, crew: Crew
) -> list[str]:
    """Greedy answers on any layout that training runs on, without a cache: every new token costs a forward pass of the whole text. Collective.

    Args:
        room: how many positions a row may have whose longest prompt, with its answer, has so many.

    Raises:
        Interrupted: on every process.
    """
    rows = pack([len(prompt) + max_new_tokens for prompt in prompts], room)
    found: dict[int, str] = {}
    with forward_only(model):
        for row in deal_rows(rows, crew):
            answers: dict[int, list[int]] = {number: [] for number in row}
            live = list(row)
            while crew.any_live(bool(live)):
                if crew.should_stop():
                    raise Interrupted
                texts = [[*prompts[number], *answers[number]] for number in live or row[:1]]  # a forward pass of one who has ended helps the others
                chosen = _ask(model, texts, [[IGNORED] * (len(ids) - 1) + [0] for ids in texts], crew.device)[:, 1].long().tolist()
                for number, token in zip(live, chosen, strict=False):
                    answers[number].append(token)
                live = [number for number in live if len(answers[number]) < max_new_tokens and not stops.end(answers[number])]
            found |= {number: stops.text_of(ids) for number, ids in answers.items()}
    together = {number: answer for part in crew.gather(found) for number, answer in part.items()}
    return [together[number] for number in range(len(prompts))]
