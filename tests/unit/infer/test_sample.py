"""What is drawn follows the shares that temperature, top_k and top_p leave."""

import pytest
import torch

from tunelib.errors import ConfigError
from tunelib.infer.sample import Sampling, choose, restrict

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.9]])
DRAWS = 20_000


def draw(sampling: Sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.bincount(choose(LOGITS.expand(DRAWS, -1), sampling, [generator] * DRAWS), minlength=5) / DRAWS


def test_temperature_zero_takes_the_most_probable() -> None:
    assert choose(LOGITS, Sampling(), Sampling().generators(1)).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_shares_are_those_of_the_temperature(temperature: float) -> None:
    torch.testing.assert_close(draw(Sampling(temperature)), (LOGITS / temperature).softmax(-1)[0], rtol=0, atol=0.015)


def test_top_k_keeps_the_most_probable_and_their_proportions() -> None:
    expected = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, 0.9]).softmax(-1)
    torch.testing.assert_close(draw(Sampling(1.0, top_k=3)), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, [0]), (0.5, [0, 1]), (0.75, [0, 1, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_top_p_keeps_what_first_reaches_it(top_p: float, kept: list[int]) -> None:
    """The shares are 0.48, 0.18, 0.11, 0.02, 0.16."""
    assert restrict(LOGITS, Sampling(1.0, top_p=top_p))[0].isfinite().nonzero().flatten().tolist() == sorted(kept)


def test_top_p_is_that_of_transformers() -> None:
    from transformers import TopPLogitsWarper

    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    for top_p in (0.1, 0.6, 0.95):
        torch.testing.assert_close(restrict(logits, Sampling(1.0, top_p=top_p)), TopPLogitsWarper(top_p)(None, logits), rtol=0, atol=0)


def test_a_row_draws_the_same_beside_others() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1.0, seed=7)
    together = choose(logits, sampling, sampling.generators(4))
    assert together.tolist()[:2] == choose(logits[:2], sampling, sampling.generators(2)).tolist()
    assert together.tolist() != choose(logits, sampling, Sampling(1.0, seed=8).generators(4)).tolist()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p above 0"),
        ({"temperature": 1.0, "top_k": -2}, "top_k -2"),
        ({"top_k": 5}, "give a temperature"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**values)
