"""On one process: clipping is torch's; what goes wrong in an agreed block arrives unchanged."""

import pytest
import torch
from torch import nn
from unit.samples import tiny_model

from tunelib.errors import DataError, SaveError
from tunelib.parallel.reduce import agreed, clip_gradients, deal, from_main, gather_objects, sum_over_ranks


def model_with_gradients(scale: float) -> nn.Module:
    model = tiny_model()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("scale", [10.0, 1e-4])
def test_clipping_is_torchs(scale: float) -> None:
    ours, reference = model_with_gradients(scale), model_with_gradients(scale)
    norm = clip_gradients(ours.parameters(), 1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1.0))
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_below_the_limit_are_not_touched() -> None:
    model = model_with_gradients(1e-4)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    clip_gradients(model.parameters(), 1.0)
    assert all(torch.equal(one, other.grad) for one, other in zip(before, model.parameters(), strict=True))


def test_parameters_without_gradient_are_left_out() -> None:
    model = model_with_gradients(1.0)
    next(model.parameters()).grad = None
    assert clip_gradients(model.parameters(), 1.0) > 0


def test_zero_gradients_stay_zero() -> None:
    model = model_with_gradients(0.0)
    assert clip_gradients(model.parameters(), 1.0) == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_one_process_agrees_with_itself() -> None:
    assert (gather_objects(3), from_main("x"), deal([1, 2, 3])) == ([3], "x", [1, 2, 3])
    assert sum_over_ranks(torch.tensor(2.0)) == 2


def test_error_of_an_agreed_block_arrives_as_it_is() -> None:
    problem = DataError("file:3: broken")
    with pytest.raises(DataError) as caught, agreed():
        raise problem
    assert caught.value is problem
    with pytest.raises(OSError, match="disk"), agreed():
        raise OSError("disk")
    with agreed():
        pass


def test_failed_write_in_a_named_block_is_a_save_error() -> None:
    with pytest.raises(SaveError, match="step-3 cannot be written: disk"), agreed("step-3 cannot be written"):
        raise OSError("disk")
