"""Causal attention inside each document of packed rows.

On a CPU every document is attended to by itself: a mask over the whole row would skip no work. On CUDA a block mask of
FlexAttention skips what lies outside the documents. B batch, S sequence, H heads, K kv heads, D head dim.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunelib.model.cache import KeyValues
from tunelib.model.config import ModelConfig
from tunelib.model.form import PLAIN, AttentionForm, attend_to_seen
from tunelib.model.norm import build_norm
from tunelib.model.rope import rotate

SCORES_AT_ONCE = 400_000
"""Numbers: a block's scores stay in a CPU's cache, and little of what is masked is computed."""
FASTER_IN_BLOCKS = range(320, 640)
"""Tokens of a document: in this range torch's flash attention works in small pieces on a CPU, and takes up to 1.4 × as long."""


@dataclass(frozen=True)
class Segment:
    """A run of queries inside one document, with all keys of it up to the last of them.

    Attributes:
        document: where the document begins in all rows, flattened.
        first, last: the run, counted from there.
    """

    document: int
    first: int
    last: int


@dataclass(frozen=True)
class Segments:
    """Documents of rows that are cut over processes: this one's queries, in order, and how to come by all keys and values.

    Attributes:
        gather: (B, S / n, K, 2 D) of this process → (B, S, K, 2 D).
    """

    runs: tuple[Segment, ...]
    gather: Callable[[Tensor], Tensor]


# What tells documents apart: their lengths, row after row (CPU), FlexAttention's block masks by window (CUDA), or, of rows that are cut over
# processes, segments; or what was read before, of a text that goes on.
Documents = tuple[int, ...] | Segments | KeyValues | dict[int, Any]


class Attention(nn.Module):
    """What grouped-query attention with rotary positions has to learn. `attend` stands between forward and ``o_proj``; the layer calls it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.qk_norm, self.is_fused = config.head_dim, config.qk_norm, config.fused_projections
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q_size, kv_size, _ = sizes = [count * config.head_dim for count in self.heads]
        if self.is_fused:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(sizes), bias=config.attention_bias)
        else:
            self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        if self.qk_norm != "none":
            self.q_norm = build_norm(config, q_size if self.qk_norm == "projection" else config.head_dim)
            self.k_norm = build_norm(config, kv_size if self.qk_norm == "projection" else config.head_dim)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, hidden) → q (B, S, H, D), k and v (B, S, K, D)."""
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim)) for projected in self._project(x))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope), rotate(k, *rope), v

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, hidden) → (B, S, H D) and twice (B, S, K D)."""
        if self.is_fused:
            fused = self.qkv_proj(x)
            q, k, v = fused.split([fused.shape[-1] * count // sum(self.heads) for count in self.heads], dim=-1)  # of this process's heads
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm == "projection" else (q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, form: AttentionForm = PLAIN) -> Tensor:
    """Causal attention of q (B, S, H, D) to k, v (B, S, K, D) inside each document, → (B, S, H, D)."""
    if isinstance(documents, tuple):
        return attend_per_document(q, k, v, documents, form)
    if isinstance(documents, KeyValues):
        return documents.attend(q, k, v, form)
    if isinstance(documents, Segments):
        return attend_segments(q, k, v, documents, form)
    return attend_flex(q, k, v, documents[form.window], form)


def plan_documents(
    document_lengths: tuple[int, ...] | Segments | KeyValues, x: Tensor, head_dim: int, windows: tuple[int, ...] = (), softcap: float = 0.0
) -> Documents:
    """What `attend` needs to keep the documents of x (B, S, hidden) apart; made once per micro-batch, shared by all layers.

    FlexAttention's kernels know neither float64 nor heads below 16; one document by itself, as in generation, needs no mask.
    """
    if isinstance(document_lengths, Segments | KeyValues):
        return document_lengths
    has_kernel = x.is_cuda and x.dtype != torch.float64 and head_dim >= 16
    if not has_kernel or (len(document_lengths) == 1 and not softcap):  # capped scores would else be whole matrices
        return document_lengths
    return {window: build_block_mask(document_lengths, len(x), x.device, window) for window in dict.fromkeys(windows or (0,))}


def attend_per_document(q: Tensor, k: Tensor, v: Tensor, document_lengths: tuple[int, ...], form: AttentionForm = PLAIN) -> Tensor:
    """The same, one document after the other."""
    rows = (tensor.flatten(0, 1) for tensor in (q, k, v))
    if q.device.type == "cpu":
        return document_attention(*rows, document_lengths, form.scale, form.softcap, form.window)[0].unflatten(0, q.shape[:2])
    attended = []
    # split's backward is one concatenation; slices would each fill a gradient of full size.
    for q_i, k_i, v_i in zip(*(tensor.split(document_lengths) for tensor in rows), strict=True):  # (L, H, D), (L, K, D)
        attended.append(_attend_to_end(q_i, k_i, v_i, form))
    return torch.cat(attended).unflatten(0, q.shape[:2])


def _attend_to_end(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
    """Attention of a document's queries (n, H, D), the last of which is where keys and values (L, K, D) end, → (n, H, D)."""
    first, seen = len(k) - len(q), None
    if first or not form.is_plain_for(len(k)):
        begin = max(0, first - form.window + 1) if form.window else 0  # what is before it nobody sees
        k, v = k[begin:], v[begin:]
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(first - begin)
        seen = seen.triu(first - begin - form.window + 1) if form.window else seen
    return attend_to_seen(_heads_first(q), _heads_first(k), _heads_first(v), seen, form).squeeze(0).transpose(0, 1)


def _heads_first(rows: Tensor) -> Tensor:
    """(L, H, D) → (1, H, L, D)."""
    return rows.transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("tunelib::document_attention", mutates_args=())  # to autograd and to what keeps or recomputes activations it is one
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None = None, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document on a CPU: by torch's flash attention, or in blocks where that is faster, or where only those can.

    All documents' results are kept once, as the layer keeps them; pieces that are put together later would be kept beside them.

    Args:
        q, k, v: (T, H, D) and (T, K, D), documents end to end.
        scale, softcap, window: see `AttentionForm`.

    Returns:
        (T, H, D), and the logarithms of the sums of powers (T, H), for the backward pass of flash attention.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    sums = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    form = AttentionForm(scale, softcap, window)
    for q_i, k_i, v_i, out_i, sums_i in zip(*(tensor.split(lengths) for tensor in (q, k, v, out, sums)), strict=True):
        if _goes_in_blocks(q_i, form):
            _attend_in_blocks(q_i, k_i, v_i, out_i, form)
        else:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            attended, summed = flash(_heads_first(q_i), _heads_first(k_i), _heads_first(v_i), is_causal=True, scale=scale)
            out_i.copy_(attended.squeeze(0).transpose(0, 1))
            sums_i.copy_(summed.squeeze(0).transpose(0, 1))
    return out, sums


@torch.library.custom_op("tunelib::document_attention_backward", mutates_args=())
def _document_attention_backward(
    of_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    lengths: Sequence[int],
    scale: float | None,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    form = AttentionForm(scale, softcap, window)
    of_q, of_k, of_v = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v))
    pieces = (tensor.split(lengths) for tensor in (of_out, q, k, v, out, sums, of_q, of_k, of_v))
    for of_out_i, q_i, k_i, v_i, out_i, sums_i, *gradients in zip(*pieces, strict=True):
        if _goes_in_blocks(q_i, form):
            _attend_in_blocks_backward(form, of_out_i, q_i, k_i, v_i, *gradients)
        else:
            flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            kept = (_heads_first(tensor) for tensor in (of_out_i, q_i, k_i, v_i, out_i))
            for place, gradient in zip(gradients, flash_backward(*kept, sums_i.T.unsqueeze(0), 0.0, True, scale=scale), strict=True):
                place.copy_(gradient.squeeze(0).transpose(0, 1))
    return of_q, of_k, of_v


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_document_attention_backward.register_fake
def _(of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


document_attention.register_autograd(
    lambda ctx, of_out, _: (*_document_attention_backward(of_out, *ctx.saved_tensors, *ctx.rest), None, None, None, None), setup_context=_keep
)


def _goes_in_blocks(q: Tensor, form: AttentionForm) -> bool:
    return not form.is_plain_for(len(q)) or (q.dtype in (torch.float32, torch.float64) and len(q) in FASTER_IN_BLOCKS)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, out: Tensor, form: AttentionForm) -> None:
    """Causal attention of one document from large products of matrices, a block of queries with all keys up to its last at a time.

    q (L, H, D), k, v (L, K, D) → out (L, H, D). Products are taken per kv head, for the G query heads that share it together.
    """
    for block in _blocks(q, k, form):
        place = block.queries_of(out)
        place.copy_(torch.bmm(block.shares(q, k)[1].to(q.dtype), block.keys_of(v)).view(place.shape))


def _attend_in_blocks_backward(
    form: AttentionForm, of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor
) -> None:
    of_k.zero_()
    of_v.zero_()
    for block in _blocks(q, k, form):
        queries, shares, slopes = block.shares(q, k)
        of_part = block.queries_of(of_out).contiguous().view_as(queries)
        block.keys_of(of_v).add_(torch.bmm(shares.to(q.dtype).transpose(1, 2), of_part))
        of_shares = torch.bmm(of_part, block.keys_of(v).transpose(1, 2)).to(shares.dtype)
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        if slopes is not None:
            of_scores *= slopes
        of_scores = of_scores.to(q.dtype)
        place = block.queries_of(of_q)
        torch.mul(torch.bmm(of_scores, block.keys_of(k)).view(place.shape), block.scale, out=place)
        block.keys_of(of_k).add_(torch.bmm(of_scores.transpose(1, 2), queries))  # which are scaled


@dataclass(frozen=True)
class _Block:
    """Queries ``first`` to ``last`` of a document, of ``num_kv_heads`` groups of G heads, and keys ``begin`` to ``last`` (n of them each)."""

    first: int
    last: int
    begin: int
    num_kv_heads: int
    scale: float
    form: AttentionForm

    def queries_of(self, tensor: Tensor) -> Tensor:
        """A part of (L, H, D) as (K, n, G, D)."""
        return tensor[self.first : self.last].unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """A part of (L, K, D) as (K, m, D)."""
        return tensor[self.begin : self.last].transpose(0, 1)

    def shares(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The queries, scaled, (K, n G, D); what each gives of its attention to each key, (K, n G, m), in float32 or better; and how steeply
        capped scores follow, of the same shape, None where they are not capped."""
        queries = self.queries_of(q)
        group, softcap, window = queries.shape[2], self.form.softcap, self.form.window
        scaled = torch.mul(queries, self.scale, out=torch.empty(queries.shape, dtype=q.dtype)).flatten(1, 2)
        scores = torch.bmm(scaled, self.keys_of(k).transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
        slopes = None
        if softcap:
            bent = scores.div_(softcap).tanh_()
            slopes = 1 - bent.square()
            scores = bent.mul_(softcap)
        scores[:, :, self.first - self.begin :] += _not_later(self.last - self.first, group, scores.dtype)
        if window and self.begin < self.last - window:
            keys, positions = torch.arange(self.begin, self.last), torch.arange(self.first, self.last)
            scores.masked_fill_((keys <= positions[:, None] - window).repeat_interleave(group, 0), -torch.inf)
        return scaled, torch.softmax(scores, -1), slopes


def _blocks(q: Tensor, k: Tensor, form: AttentionForm) -> Iterator[_Block]:
    """A document in blocks of about as many queries."""
    length, num_heads = q.shape[:2]
    window = form.window if 0 < form.window < length else length
    width = -(-length // -(-length // max(16, SCORES_AT_ONCE // (num_heads * window))))
    scale = q.shape[-1] ** -0.5 if form.scale is None else form.scale
    for first in range(0, length, width):
        yield _Block(first, min(first + width, length), max(0, first - window + 1), k.shape[1], scale, form)


@functools.lru_cache(maxsize=256)
def _not_later(num_queries: int, group: int, dtype: torch.dtype) -> Tensor:
    """(n G, n): what is added to scores, minus infinity where a key is later than the query."""
    return torch.full((num_queries, num_queries), -torch.inf, dtype=dtype).triu(1).repeat_interleave(group, 0)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, form: AttentionForm = PLAIN) -> Tensor:
    """Causal attention of this process's q (B, S / n, H, D) to all keys and values of its documents, → (B, S / n, H, D)."""
    keys_values = segments.gather(torch.cat((k, v), dim=-1)).flatten(0, 1)  # (B S, K, 2 D)
    ends: dict[int, int] = {}  # of each document, as far as a query of this process looks
    for run in segments.runs:
        ends[run.document] = max(ends.get(run.document, 0), run.last)
    lengths, place = [], 0
    for document in sorted(ends):
        lengths += [document - place, ends[document]]
        place = document + ends[document]
    cut = keys_values.split([*lengths, len(keys_values) - place])  # whose backward is one concatenation
    of_document = {document: cut[2 * number + 1] for number, document in enumerate(sorted(ends))}
    attended = []
    for run, queries in zip(segments.runs, q.flatten(0, 1).split([run.last - run.first for run in segments.runs]), strict=True):
        k_i, v_i = of_document[run.document][: run.last].chunk(2, dim=-1)  # (last, K, D)
        attended.append(_attend_to_end(queries, k_i, v_i, form))
    return torch.cat(attended).unflatten(0, q.shape[:2])


def attend_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, form: AttentionForm = PLAIN) -> Tensor:
    """The same through FlexAttention."""
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, S, D)
    words = {"block_mask": block_mask, "scale": form.scale, "enable_gqa": q.shape[2] != k.shape[2]}
    return _flex(q.is_cuda).attend(*heads_first, score_mod=_capped_by(form.softcap), **words).transpose(1, 2)


@functools.cache  # one function for each cap: another would be compiled again
def _capped_by(softcap: float) -> Callable[..., Tensor] | None:
    """FlexAttention's change of scores."""

    def cap(score: Tensor, *_place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap if softcap else None


def build_block_mask(document_lengths: tuple[int, ...], num_rows: int, device: torch.device, window: int = 0) -> Any:
    """FlexAttention's mask: same document, not later, in the window. No document crosses from one row to the next."""
    lengths = torch.tensor(document_lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(document_lengths), device=device), lengths).view(num_rows, -1)  # (B, S)

    def same_document_not_later(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[row, query] == document[row, key]) & (query >= key)

    def in_window(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return same_document_not_later(row, head, query, key) & (query - key < window)

    seen = in_window if window else same_document_not_later
    rows, width = document.shape
    return _flex(device.type == "cuda").build_mask(seen, rows, None, width, width, device=str(device))


@dataclass(frozen=True)
class _Flex:
    attend: Any
    build_mask: Any


@functools.cache
def _flex(compiled: bool) -> _Flex:
    """FlexAttention's two functions; eager ones hold a whole (S, S) matrix, so on CUDA both are compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return _Flex(torch.compile(flex_attention), torch.compile(create_block_mask)) if compiled else _Flex(flex_attention, create_block_mask)
