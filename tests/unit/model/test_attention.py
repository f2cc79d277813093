"""Attention never crosses from one document to the next, by either implementation."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from unit.samples import tiny_model

from tunelib.model import attention
from tunelib.model.attention import (
    FASTER_IN_BLOCKS,
    Segment,
    Segments,
    attend,
    attend_flex,
    attend_per_document,
    build_block_mask,
    document_attention,
    plan_documents,
)
from tunelib.model.form import PLAIN, AttentionForm

CPU = torch.device("cpu")
LENGTHS = (5, 1, 10, 3, 13)  # two rows of 16: the documents of a row end with it


def random_qkv(kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 4, 8), (2, 16, kv_heads, 8), (2, 16, kv_heads, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def attend_by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], form: AttentionForm = PLAIN) -> torch.Tensor:
    """softmax(cap(q·k · scale)) v with a mask over all tokens laid end to end."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    back = place[:, None] - place
    mask = (document[:, None] == document) & (back >= 0) & (back < (form.window or len(document)))
    repeat, rows = q.shape[2] // k.shape[2], q.shape[:2]
    q, k, v = (tensor.flatten(0, 1).transpose(0, 1) for tensor in (q, k, v))  # (H, B·S, D)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = q @ k.transpose(1, 2) * (form.scale or q.shape[-1] ** -0.5)
    scores = form.softcap * torch.tanh(scores / form.softcap) if form.softcap else scores
    return (F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v).transpose(0, 1).unflatten(0, rows)


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


FORMS = {
    "scaled": AttentionForm(0.2),
    "capped": AttentionForm(0.5, 1.5),
    "window": AttentionForm(None, 0.0, 7),
    "capped in a window": AttentionForm(0.5, 1.5, 7),
    "window of one": AttentionForm(None, 1.5, 1),
    "window as long as the longest document": AttentionForm(None, 0.0, 61),
}
LONG = (61, 3, 1, 15, 60, 7, 13)  # two rows of 80


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("at_once", [2 * 16 * 61, 400_000], ids=["several blocks", "one block"])
def test_capped_and_windowed_attention_is_the_formula_with_its_gradients(monkeypatch: pytest.MonkeyPatch, form: AttentionForm, at_once: int) -> None:
    """On one process, and in rows that are cut over two: documents longer than the window, and shorter."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    assert sum(LONG) == 160
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 80, heads, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    weights = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    expected = attend_by_formula(q, k, v, LONG, form)
    of_expected = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    found = attend(q, k, v, LONG, form)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), (q, k, v)), of_expected, rtol=0, atol=1e-11)
    begins = [sum(LONG[:number]) for number in range(len(LONG))]
    cuts = [  # both halves of each document, a half at a time: one that begins where the document does, and one that looks back
        Segments(
            tuple(
                Segment(begin, first, last)
                for begin, length in zip(begins, LONG, strict=True)
                for first, last in (((0, length // 2), (length // 2, length))[half],)
                if first < last
            ),
            lambda part: part,
        )
        for half in (0, 1)
    ]
    total = torch.zeros((), dtype=torch.float64)
    for cut in cuts:
        places = torch.cat([torch.arange(run.document + run.first, run.document + run.last) for run in cut.runs])
        own = attention.attend_segments(q.flatten(0, 1)[places][None], k, v, cut, form)[0]
        torch.testing.assert_close(own, expected.flatten(0, 1)[places], rtol=0, atol=1e-12)
        total = total + (own * weights.flatten(0, 1)[places]).sum()
    torch.testing.assert_close(torch.autograd.grad(total, (q, k, v)), of_expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_capped_and_windowed_attention_in_bfloat16_is_that_of_float32_rounded(form: AttentionForm) -> None:
    q, k, v = (tensor.bfloat16() for tensor in random_qkv())
    found = attend_per_document(q, k, v, LENGTHS, form)
    assert found.dtype == torch.bfloat16
    expected = attend_by_formula(q.float(), k.float(), v.float(), LENGTHS, form)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)  # scores are float32, shares and values are rounded


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", [FORMS["capped"], AttentionForm(0.5, 1.5, 4), AttentionForm(None, 0.0, 4)], ids=str)
def test_flex_attention_caps_and_has_windows(form: AttentionForm) -> None:
    q, k, v = random_qkv()
    with torch.no_grad():
        flex = attend_flex(q, k, v, build_block_mask(LENGTHS, 2, CPU, form.window), form)
    torch.testing.assert_close(flex, attend_by_formula(q, k, v, LENGTHS, form), rtol=0, atol=1e-5)


def test_document_that_the_window_holds_takes_the_fast_path() -> None:
    q, k, v = (torch.randn(1, 20, heads, 8) for heads in (4, 2, 2))

    def calls_of(window: int) -> int:
        with torch.profiler.profile() as seen:
            attend_per_document(q, k, v, (12, 8), AttentionForm(None, 0.0, window))
        return sum(event.name == "aten::_scaled_dot_product_flash_attention_for_cpu" for event in seen.events() or ())

    assert [calls_of(window) for window in (0, 12, 11, 7)] == [2, 2, 1, 0]
