"""The loss: a sum over trained tokens, never a mean, so that any split of a batch adds up to the same number (law 1).

T trained tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tunelib.batch import IGNORED

POSITIONS_AT_ONCE = 1024
"""Rows of logits that are held; with fewer, the head's gradient would be read and written again too often."""


class VocabularyShare(Protocol):
    """What a process that has a part of the vocabulary asks of the others (`tunelib.parallel.tensor`)."""

    @property
    def first(self) -> int: ...  # token id of this process's first row of the head
    def combine(self, logsumexp: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]: ...  # of all parts together; (t, 1) each


def find_labelled(labels: Tensor) -> Tensor:
    """(T): the places of those labels (B, S) that are not IGNORED, counted over all rows. Waits for the device."""
    return (labels.flatten() != IGNORED).nonzero().squeeze(1)


def take(places: Tensor, of_all: Tensor) -> Tensor:
    """(B, S, …) → (T, …): a copy of what is at some places, counted over all rows."""
    return of_all.flatten(0, 1).index_select(0, places)


def summed_loss(hidden: Tensor, labels: Tensor, head: Tensor, share: VocabularyShare | None = None, softcap: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over the trained tokens of a micro-batch, in float32 or better; 0 where there is none.

    Their logits are never all there.

    Args:
        hidden: (T, hidden) after the last norm.
        labels: (T).
        head: (V, hidden), or this process's rows of it.
        share: where other processes have other rows; the gradient of ``hidden`` is then a part of a sum over them.
        softcap: see `capped`.
    """
    return _HeadLoss.apply(hidden, head, labels, share, softcap, torch.is_grad_enabled())


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Logits between -softcap and softcap, by cap · tanh(x / cap) (Gemma 2, section 2); 0: as they are."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def token_scores(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], softcap: float = 0.0) -> Tensor:
    """What a model thinks of each labelled place, (T, 2) in float32 or better: the label's log-probability in nats, and the id of the most probable
    token (which float32 holds exactly).

    Args:
        hidden: (T, hidden) after the last norm.
        labels: (T).
        head: hidden states (t, hidden) → logits (t, V); called with some at a time.
        softcap: logits are held within ± this; 0 for no limit.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    scores = torch.empty(len(labels), 2, dtype=precise, device=hidden.device)
    for begin in range(0, len(labels), POSITIONS_AT_ONCE):
        at_once = slice(begin, begin + POSITIONS_AT_ONCE)
        logits = capped(head(hidden[at_once]).to(precise), softcap)  # (t, V)
        scores[at_once, 0] = logits.gather(1, labels[at_once, None]).squeeze(1) - logits.logsumexp(1)
        scores[at_once, 1] = logits.argmax(1).to(precise)
    return scores


class _HeadLoss(torch.autograd.Function):
    """Head and cross-entropy, some positions at a time.

    The loss is the last thing of a forward pass, and its gradient a number: so the gradients of hidden states and head are formed while the
    logits are there, and the backward pass scales them. Nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, share: VocabularyShare | None, softcap: float, with_gradients: bool
    ) -> Tensor:
        """hidden (T, hidden), head (V, hidden), labels (T) → the sum of their losses."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        hidden_needs, head_needs = (with_gradients and needs for needs in ctx.needs_input_grad[:2])
        of_hidden = torch.empty_like(hidden) if hidden_needs else None
        of_head = None
        if head_needs:  # before there are logits: what is above them on the heap when they go would leave a hole, of another size in each step
            of_head = torch.empty(head.shape, dtype=precise if len(labels) > POSITIONS_AT_ONCE else head.dtype, device=head.device)
        for begin in range(0, len(labels), POSITIONS_AT_ONCE):
            at_once = slice(begin, begin + POSITIONS_AT_ONCE)
            summed, of_logits = _loss_of_logits((hidden[at_once] @ head.T).to(precise), labels[at_once, None], share, softcap)
            loss += summed
            of_logits = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, head, out=of_hidden[at_once])
            if of_head is not None:
                _add_product(of_head, of_logits.T, hidden[at_once], is_first=begin == 0)
            del of_logits  # before there are others
        if of_head is not None:
            of_head = of_head.to(head.dtype) if len(labels) else of_head.zero_()
        ctx.save_for_backward(of_hidden, of_head)
        ctx.scale = None
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        # In place, since a second matrix of the head's size takes memory and, where the system has to find it, ten times as long. Who comes again, as
        # a pipeline's schedule does, for inputs and later for weights, gets copies.
        gradients = ctx.saved_tensors
        if ctx.scale is None:
            ctx.scale = scale
            for gradient in (gradient for gradient in gradients if gradient is not None):
                with torch.autograd._unsafe_preserve_version_counter(gradient):
                    gradient.mul_(scale.to(gradient.dtype))
        else:
            gradients = tuple(gradient if gradient is None else gradient * (scale / ctx.scale).to(gradient.dtype) for gradient in gradients)
        return *gradients, None, None, None, None


def _loss_of_logits(logits: Tensor, labels: Tensor, share: VocabularyShare | None, softcap: float) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of logits (t, V) with labels (t, 1), and its gradient, in the logits' memory."""
    labels = labels - (share.first if share else 0)
    is_here = (labels >= 0) & (labels < logits.shape[1])
    labels = torch.where(is_here, labels, 0)
    slopes = None
    if softcap:
        bent = logits.div_(softcap).tanh_()
        slopes = 1 - bent.square()
        logits = bent.mul_(softcap)
    chosen = torch.where(is_here, logits.gather(1, labels), 0)
    largest, where = logits.max(1, keepdim=True)
    shares = torch.ops.aten._softmax.out(logits, 1, False, out=logits)  # the largest of which is 1 / the sum of powers
    own = total = largest - shares.gather(1, where).log()
    if share is not None:
        total, chosen = share.combine(own, chosen)
        shares *= (own - total).exp()
    of_logits = shares.scatter_add_(1, labels, -is_here.to(shares.dtype))
    return (total - chosen).sum(), of_logits if slopes is None else of_logits.mul_(slopes)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total += left right, or = the first of them; sums of many products keep a type that does not lose small ones."""
    if left.dtype != total.dtype:
        product = left @ right
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)
