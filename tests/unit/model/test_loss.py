"""The loss is a sum over trained tokens, which any split of a batch adds up to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unit.samples import tiny_model

from tunelib.batch import IGNORED
from tunelib.model import loss as loss_room
from tunelib.model.loss import VocabularyShare, capped, find_labelled, summed_loss, take


def make_case() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 10, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) < 0.6] = IGNORED
    head = nn.Linear(8, 10, bias=False, dtype=torch.float64)
    return hidden, labels, head


def labelled_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor, share: VocabularyShare | None = None, softcap: float = 0.0
) -> torch.Tensor:
    asked = find_labelled(labels)
    return summed_loss(take(asked, hidden), take(asked, labels), head, share, softcap)


def test_loss_is_torchs_cross_entropy_summed() -> None:
    hidden, labels, head = make_case()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(labelled_loss(hidden, labels, head.weight), expected)


def test_losses_of_micro_batches_add_up_to_the_batchs() -> None:
    hidden, labels, head = make_case()
    parts = sum(labelled_loss(hidden[row : row + 1], labels[row : row + 1], head.weight) for row in range(4))
    torch.testing.assert_close(parts, labelled_loss(hidden, labels, head.weight))


@pytest.mark.parametrize("trained", ["both", "hidden", "head", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_positions_in_parts_have_the_gradients_of_all_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, trained: str) -> None:
    """Also where labels are few, and where some logits are far above the others."""
    generator = torch.Generator().manual_seed(2)
    hidden = (torch.randn(3, 7, 16, generator=generator) * 4).to(dtype).requires_grad_(trained in ("both", "hidden"))
    head = (torch.randn(50, 16, generator=generator) * 2).to(dtype).requires_grad_(trained in ("both", "head"))
    labels = torch.randint(0, 50, (3, 7), generator=generator)
    labels[1] = IGNORED
    inputs = [tensor for tensor in (hidden, head) if tensor.requires_grad]
    logits = (hidden @ head.T).to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for at_once in (1, 5, 14, 1024):
        monkeypatch.setattr(loss_room, "POSITIONS_AT_ONCE", at_once)
        found = labelled_loss(hidden, labels, head)
        torch.testing.assert_close(found, expected, rtol=min(tolerance, 1e-5), atol=tolerance)
        if inputs:
            of_found = torch.autograd.grad(found / 7, inputs, retain_graph=True)
            again = torch.autograd.grad(found / 7, inputs)  # as some schedules of pipelines ask for
            of_expected = torch.autograd.grad(expected / 7, inputs, retain_graph=True)
            torch.testing.assert_close(of_found, of_expected, rtol=tolerance, atol=tolerance)
            assert all(torch.equal(first, second) for first, second in zip(of_found, again, strict=True))


def test_micro_batch_without_a_trained_token_gives_zero_and_zero_gradients() -> None:
    model = tiny_model()
    labels = torch.full((2, 4), IGNORED)
    loss = model(torch.ones(2, 4, dtype=torch.int64), torch.arange(4).expand(2, 4), (4, 4), labels=labels)
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_loss_is_in_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    hidden, labels, head = make_case()
    assert labelled_loss(hidden.to(dtype), labels, head.weight.to(dtype)).dtype == expected


def test_model_with_labels_gives_the_loss_of_its_logits() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 48, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    positions, lengths = torch.arange(6).expand(2, 6), (6, 6)
    logits = model(tokens, positions, lengths)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, positions, lengths, labels=labels), expected)


class HalfOfTwo:
    """A process that has the first or the second half of a vocabulary, and is told of the other."""

    def __init__(self, first: int, others: tuple[torch.Tensor, torch.Tensor]):
        self.first, self._others = first, others

    def combine(self, logsumexp: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.logaddexp(logsumexp, self._others[0]), chosen + self._others[1]


def test_who_comes_again_gets_gradients_of_another_scale() -> None:
    hidden, labels, head = make_case()
    hidden.requires_grad_()
    loss = labelled_loss(hidden, labels, head.weight)
    once = torch.autograd.grad(loss / 3, (hidden, head.weight), retain_graph=True)
    once = [gradient.clone() for gradient in once]
    again = torch.autograd.grad(2 * loss, (hidden, head.weight))
    torch.testing.assert_close([gradient / 6 for gradient in again], once)


@pytest.mark.parametrize("at_once", [3, 1024])
def test_capped_logits_have_the_loss_and_the_gradients_of_the_formula(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The whole vocabulary, and each half of it by itself."""
    monkeypatch.setattr(loss_room, "POSITIONS_AT_ONCE", at_once)
    hidden, labels, head = make_case()
    hidden.requires_grad_()
    logits = capped(head(hidden), 0.8)
    assert logits.abs().max() > 0.6  # where the cap bends much
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    of_expected = torch.autograd.grad(expected, (hidden, head.weight))
    found = labelled_loss(hidden, labels, head.weight, softcap=0.8)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, head.weight)), of_expected)
    if at_once < 1024:
        return  # what is told of the other half is of all positions
    trained = labels != IGNORED
    halves: tuple[torch.Tensor, list[torch.Tensor]] = torch.zeros_like(hidden), []
    for first in (0, 5):
        other = logits.detach()[trained][:, 5 - first : 10 - first]
        ids = labels[trained][:, None] - (5 - first)
        is_there = (ids >= 0) & (ids < 5)
        chosen = torch.where(is_there, other.gather(1, ids.clamp(0, 4)), 0)
        share = HalfOfTwo(first, (other.logsumexp(1, keepdim=True), chosen))
        rows = head.weight.detach()[first : first + 5].requires_grad_()
        loss = labelled_loss(hidden, labels, rows, share, softcap=0.8)
        torch.testing.assert_close(loss, expected)
        of_hidden, of_rows = torch.autograd.grad(loss, (hidden, rows))
        halves[0].add_(of_hidden)
        halves[1].append(of_rows)
    torch.testing.assert_close((halves[0], torch.cat(halves[1])), of_expected)
