"""Several sources in one epoch: how many documents each gives, and which ones.

A source is an endless series of passes over its documents, each pass in an order of its own; every epoch takes the next so many of
it. A source that is repeated 2.5 times gives each document two or three times an epoch, and no document a third time before all
had their second. Of a source that gives less than one document an epoch, most epochs have none. One source alone gives each
document once.
"""

from dataclasses import dataclass

import numpy as np

from tunelib.data.index import Index
from tunelib.errors import DataError

LEAST_DOCUMENTS = 1 - 1e-6
"""Of some source an epoch has to take this many, so that none is empty; less than one by no more than rounding."""


@dataclass(frozen=True)
class Mix:
    """The documents of each source, and how many of them an epoch takes on average: not always a whole number, and of some source one at least."""

    members: tuple[np.ndarray, ...]
    takes: tuple[float, ...]

    def documents(self, seed: int, epoch: int) -> np.ndarray:
        """The documents of an epoch, source after source, a function of (seed, epoch)."""
        return np.concatenate([self._take(number, seed, epoch) for number in range(len(self.members))])

    def _take(self, number: int, seed: int, epoch: int) -> np.ndarray:
        members = self.members[number]
        place, end = (int(passed * self.takes[number] + 0.5) for passed in (epoch, epoch + 1))
        chosen = [members[:0]]
        while place < end:
            full_pass, first = divmod(place, len(members))
            until = min(len(members), first + end - place)
            if until - first == len(members):
                chosen.append(members)
            else:
                order = seeded_random(seed, number, full_pass, 1).permutation(len(members))
                chosen.append(members[order[first:until]])
            place += until - first
        return np.concatenate(chosen)


def seeded_random(seed: int, *purpose: int) -> np.random.RandomState:
    """Random numbers for a purpose. RandomState and not Generator: numpy promises that its streams never change."""
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, *purpose])


def build_mix(index: Index) -> Mix:
    """The mix that the sources' weights or repeats ask for: by weights, an epoch has as many tokens as all documents together.

    Raises:
        DataError: a source has no document to train on, or there would be epochs without any.
    """
    members = tuple(np.flatnonzero(index.source == number) for number in range(len(index.sources)))
    for source, documents in zip(index.sources, members, strict=True):
        if not len(documents):
            raise DataError(f"{source.found.opened.name}: all its documents are held out, and none is left to train on")
    weights = [source.found.weight for source in index.sources]
    if weights[0] is None:
        repeats = [source.found.repeats or 1.0 for source in index.sources]
    else:
        total = sum(weight for weight in weights if weight is not None)
        tokens = [int(index.lengths[documents].sum()) for documents in members]
        repeats = [(weight or 0) / total * sum(tokens) / own for weight, own in zip(weights, tokens, strict=True)]
    takes = tuple(times * len(documents) for times, documents in zip(repeats, members, strict=True))
    if max(takes) < LEAST_DOCUMENTS:
        most = max(range(len(takes)), key=takes.__getitem__)
        raise DataError(
            f"{index.sources[most].found.opened.name}: repeats = {repeats[most]:g} of {len(members[most]):,} documents takes less than one document "
            "an epoch, and no other source more; raise the repeats of dataset.mix"
        )
    return Mix(members, takes)


def describe_mix(index: Index, mix: Mix) -> list[str]:
    """Each source's share of an epoch, a line each; nothing for one source that is taken once."""
    if len(mix.members) == 1 and mix.takes[0] == len(mix.members[0]):
        return []
    tokens = [index.lengths[documents].mean() * take for documents, take in zip(mix.members, mix.takes, strict=True)]
    lines = []
    for source, own, take, documents in zip(index.sources, tokens, mix.takes, mix.members, strict=True):
        times = f"{take / len(documents):.3g} times its {len(documents):,} documents"
        if take < 1:
            times += f", which is one document in {1 / take:,.3g} epochs"
        lines.append(f"{source.found.opened.name}: {own / sum(tokens):.1%} of the tokens of an epoch, {times}")
    return lines
