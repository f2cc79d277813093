"""NF4 as it was published: its levels, its error on normal weights, its size, and the gradient through it."""

import torch

from tunelib.quantize import LEVELS, dequantize, linear_nf4, packed_columns, quantize


def test_error_on_normal_weights_is_the_published_one() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(weight), torch.float32) - weight).abs().mean().item()
    assert abs(error - 0.0728) < 2e-4  # mean absolute error of NF4 with blocks of 64 on standard normal numbers (bitsandbytes' own tests: 0.0728)


def test_levels_and_blocks_of_zeros_come_back_as_they_are() -> None:
    weight = torch.zeros(2, 128)
    weight[0, :16] = torch.tensor(LEVELS)
    weight[1, 64:80] = 3.0 * torch.tensor(LEVELS)
    assert torch.equal(dequantize(quantize(weight), torch.float32), weight)


def test_four_bits_and_a_magnitude_for_each_block_are_kept() -> None:
    packed = quantize(torch.randn(8, 256))
    assert (packed.dtype, packed.shape) == (torch.uint8, (8, packed_columns(256)))
    assert packed.numel() / (8 * 256) == 0.5625


def test_rows_are_quantised_by_themselves() -> None:
    weight = torch.randn(8, 128)
    assert torch.equal(quantize(weight)[2:5], quantize(weight[2:5]))


def test_product_and_its_gradient_are_those_of_the_quantised_weight() -> None:
    packed = quantize(torch.randn(32, 64))
    x = torch.randn(3, 5, 64, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    weight = dequantize(packed, torch.float32)
    found, expected = linear_nf4(x, packed), plain @ weight.T
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, plain.grad)


def test_share_without_rows_is_one_too() -> None:
    packed = quantize(torch.empty(0, 128))
    assert packed.shape == (0, packed_columns(128))
    assert dequantize(packed, torch.bfloat16).shape == (0, 128)
