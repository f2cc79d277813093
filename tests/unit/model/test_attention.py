"""Attention never crosses from one document to the next, by either implementation."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from unit.samples import tiny_model

from tunelib.model.attention import FASTER_IN_BLOCKS, attend_flex, attend_per_document, build_block_mask, document_attention, plan_documents

CPU = torch.device("cpu")
LENGTHS = (5, 1, 10, 3, 13)  # two rows of 16: the documents of a row end with it


def random_qkv(kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 4, 8), (2, 16, kv_heads, 8), (2, 16, kv_heads, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def attend_by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """softmax(q·k / √D) v with a mask over all tokens laid end to end."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (tensor.flatten(0, 1).transpose(0, 1) for tensor in (q, k, v))  # (H, B·S, D)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return (F.softmax(scores, dim=-1) @ v).transpose(0, 1).unflatten(0, (2, 16))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_per_document_is_the_formula(kv_heads: int) -> None:
    q, k, v = random_qkv(kv_heads, torch.float64)
    torch.testing.assert_close(attend_per_document(q, k, v, LENGTHS), attend_by_formula(q, k, v, LENGTHS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (3, 3), (4, 2), (9, 3), (40, 8)])
@pytest.mark.parametrize("length", [1, 17, FASTER_IN_BLOCKS.start, FASTER_IN_BLOCKS.stop - 1])
def test_attention_in_blocks_is_torchs_with_its_gradients(length: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((length, heads, 16), (length, kv_heads, 16), (length, kv_heads, 16))
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator, dtype=dtype)
    plain = F.scaled_dot_product_attention(*(tensor.transpose(0, 1)[None] for tensor in inputs), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    blocks, _ = document_attention(*inputs, (length,))
    found = torch.autograd.grad((blocks * weights).sum(), inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(blocks, plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


def test_documents_of_middling_length_are_attended_to_in_blocks() -> None:
    """Beside shorter and longer ones, each with itself alone."""
    lengths = (5, FASTER_IN_BLOCKS.start, 7, FASTER_IN_BLOCKS.stop)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, sum(lengths), heads, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    weights = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    with torch.profiler.profile() as seen:
        out = attend_per_document(q, k, v, lengths)
        gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    calls = Counter(event.name for event in seen.events() or ())
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 3
    assert calls["aten::_softmax"] > calls["aten::_softmax_backward_data"] > 0  # the backward pass takes the softmax again
    alone = torch.cat([attend_per_document(*(t[:, a:b] for t in (q, k, v)), (b - a,)) for a, b in ((0, 5), (5, 325), (325, 332), (332, 972))], dim=1)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, torch.autograd.grad((alone * weights).sum(), (q, k, v)), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flex_attention_equals_attention_per_document(kv_heads: int) -> None:
    q, k, v = random_qkv(kv_heads)
    with torch.no_grad():
        flex = attend_flex(q, k, v, build_block_mask(LENGTHS, 2, CPU))
    torch.testing.assert_close(flex, attend_per_document(q, k, v, LENGTHS), rtol=0, atol=1e-5)


def test_block_mask_joins_a_token_to_the_earlier_ones_of_its_document() -> None:
    mask = build_block_mask((2, 3, 5), 2, CPU)
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(5), torch.arange(5), indexing="ij")
    allowed = mask.mask_mod(row, torch.tensor(0), query, key)
    assert allowed[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert torch.equal(allowed[1], torch.ones(5, 5).tril().bool())


def test_no_gradient_crosses_between_documents() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in random_qkv())
    attend_per_document(q, k, v, LENGTHS)[0, 6:].sum().backward()  # the third document alone
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert (tensor.grad[0, :6] == 0).all()
        assert (tensor.grad[1] == 0).all()
        assert tensor.grad[0, 6:].abs().sum() > 0 or tensor is k


def test_cpu_needs_nothing_but_lengths() -> None:
    assert plan_documents(LENGTHS, torch.zeros(2, 5, 4), 16) == LENGTHS


@pytest.mark.parametrize("tied", [False, True])
def test_packed_documents_equal_separate_documents(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    lengths = (4, 1, 7)
    tokens = torch.randint(0, 48, (1, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, positions, lengths)
        place = 0
        for length in lengths:
            alone = model(tokens[:, place : place + length], torch.arange(length)[None], (length,))
            torch.testing.assert_close(packed[:, place : place + length], alone, rtol=0, atol=1e-12)
            place += length


def test_token_does_not_see_what_follows_it() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 48, (1, 8), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 48
    with torch.no_grad():
        before, after = (model(of, torch.arange(8)[None], (8,)) for of in (tokens, changed))
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3
