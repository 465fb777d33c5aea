"""Triton's `attention_rows`: keys are read once, for logits and for the statistics of their softmax.

The first kernel walks along a span of the keys of one head with all query rows of its group, writes the logits and
keeps the peak and the sum of exponentials of each row as it goes (online softmax). The second turns the logits of all
heads into weights, with what the spans know, and averages them. Written and read in between are the logits, fp32
[B, H, R, N]: d / 2 times less than half-precision keys for one row and ungrouped heads.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import interpreted, launch

__all__ = ["mean_weights"]

# keys that one step takes, spans that a head's keys are cut into at most, columns and heads of a step of the average
_KEYS, _SPANS, _COLUMNS, _HEADS = 64, 64, 64, 32


@triton.jit
def _logits_kernel(
    query, key, real, logits, peaks, sums, scaling, softcap, length, span, rows, number, width, groups,
    k_batch, k_head, k_token, k_width, SEEN: tl.constexpr, CAPPED: tl.constexpr, FLOAT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """logits[q, n] = cap(scaling query[q] . key[n]), and of each span the peak and sum_n exp(logits - peak).

    q counts the rows of the query heads that share a key head; there are `rows`, `number` of them a head. SEEN says
    whether `real` is absent (0), [B, N] (1) or [B, R, N] (2).
    """
    pair, i_span = tl.program_id(0), tl.program_id(1)
    batch, head = pair // groups, pair % groups
    o_row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    o_width = tl.arange(0, WIDTH)
    m_row, m_width = o_row < rows, o_width < width
    line = pair.to(tl.int64) * rows + o_row
    p_query = query + line[:, None] * width + o_width[None, :]
    b_query = tl.load(p_query, mask=m_row[:, None] & m_width[None, :], other=0.0)
    p_key = key + batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + o_width[:, None].to(tl.int64) * k_width
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(i_span * span, tl.minimum(i_span * span + span, length), KEYS):
        o_key = start + tl.arange(0, KEYS)
        m_key = o_key < length
        seen = m_row[:, None] & m_key[None, :]
        if SEEN == 1:
            # keys that nobody sees are not even read: what they hold may be NaN
            m_key = m_key & (tl.load(real + batch * length + o_key, mask=m_key, other=0) != 0)
            seen = m_row[:, None] & m_key[None, :]
        if SEEN == 2:
            p_real = real + ((batch * number + o_row % number) * length)[:, None] + o_key[None, :]
            seen = seen & (tl.load(p_real, mask=seen, other=0) != 0)
        b_key = tl.load(
            p_key + o_key[None, :].to(tl.int64) * k_token, mask=m_width[:, None] & m_key[None, :], other=0.0
        )
        if FLOAT:
            b_logit = tl.dot(b_query.to(tl.float32), b_key.to(tl.float32), input_precision="ieee") * scaling
        else:
            b_logit = tl.dot(b_query, b_key) * scaling
        if CAPPED:
            # tanh by a sigmoid, which no large number overflows
            b_logit = softcap * (2.0 * tl.sigmoid(2.0 * b_logit / softcap) - 1.0)
        b_logit = tl.where(seen, b_logit, float("-inf"))
        tl.store(
            logits + line[:, None] * length + o_key[None, :], b_logit, mask=m_row[:, None] & (o_key < length)[None]
        )
        higher = tl.maximum(peak, tl.max(b_logit, 1))
        # a row that has seen nothing yet has no peak to subtract
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(b_logit - base[:, None]), 1)
        peak = higher
    tl.store(peaks + line * tl.num_programs(1) + i_span, peak, mask=m_row)
    tl.store(sums + line * tl.num_programs(1) + i_span, total, mask=m_row)


@triton.jit
def _mean_kernel(
    logits, peaks, sums, column, out, length, heads, number, spans, count, PICKED: tl.constexpr,
    HEADS: tl.constexpr, SPANS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b, r, v] = mean_h exp(logits[b, h, r, column[b, v]] - peak) / sum, both over all keys of the row."""
    line = tl.program_id(0)
    batch, row = line // number, line % number
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < count
    at = o_column
    if PICKED:
        at = tl.load(column + batch * count + o_column, mask=m_column, other=0)
    o_span = tl.arange(0, SPANS)
    mean = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, heads, HEADS):
        o_head = start + tl.arange(0, HEADS)
        m_head = o_head < heads
        q_row = ((batch * heads + o_head) * number + row).to(tl.int64)
        known = m_head[:, None] & (o_span < spans)[None, :]
        b_peak = tl.load(peaks + q_row[:, None] * spans + o_span[None, :], mask=known, other=float("-inf"))
        b_sum = tl.load(sums + q_row[:, None] * spans + o_span[None, :], mask=known, other=0.0)
        top = tl.max(b_peak, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        whole = tl.sum(b_sum * tl.exp(b_peak - top[:, None]), 1)
        p_logit = logits + q_row[:, None] * length + at[None, :]
        b_logit = tl.load(p_logit, mask=m_head[:, None] & m_column[None, :], other=float("-inf"))
        # rows that see no key weigh 0
        weight = tl.exp(b_logit - top[:, None]) / tl.where(whole > 0.0, whole, 1.0)[:, None]
        mean += tl.sum(weight, 0)
    tl.store(out + line.to(tl.int64) * count + o_column, mean / heads, mask=m_column)


def mean_weights(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, column: Tensor | None, softcap: float | None
) -> Tensor:
    """[B, R, V] fp32; arguments as in `vtprune.kernels.attention_rows.attention_rows`."""
    batch, heads, number, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    rows, count = heads // groups * number, length if column is None else column.shape[1]
    out = query.new_empty((batch, number, count), dtype=torch.float32)
    if 0 in (length, width):
        return out.zero_()
    span = _KEYS * triton.cdiv(triton.cdiv(length, _KEYS), _SPANS)
    spans = triton.cdiv(length, span)
    logits = query.new_empty((batch, heads, number, length), dtype=torch.float32)
    peaks, sums = (query.new_empty((batch, heads, number, spans), dtype=torch.float32) for _ in range(2))
    seen = 0 if real is None else real.dim() - 1
    # where there is no mask or column, any pointer does: it is not read
    real = logits if real is None else real.contiguous().view(torch.uint8)
    # the interpreter of Triton 3.8 multiplies the bits of bf16 numbers in a dot
    single = torch.float32 in (query.dtype, key.dtype) or query.dtype != key.dtype
    single = single or (interpreted() and query.dtype == torch.bfloat16)
    tile = max(16, min(64, triton.next_power_of_2(rows)))
    launch(
        _logits_kernel, (batch * groups, spans, triton.cdiv(rows, tile)), query.contiguous(), key, real, logits, peaks,
        sums, scaling, softcap or 1.0, length, span, rows, number, width, groups, *key.stride(), SEEN=seen,
        CAPPED=softcap is not None, FLOAT=single, ROWS=tile, KEYS=_KEYS,
        WIDTH=max(16, triton.next_power_of_2(width)),
    )  # fmt: skip
    launch(
        _mean_kernel, (batch * number, triton.cdiv(count, _COLUMNS)), logits, peaks, sums,
        logits if column is None else column.contiguous(), out, length, heads, number, spans, count,
        PICKED=column is not None, HEADS=min(_HEADS, triton.next_power_of_2(heads)),
        SPANS=max(2, triton.next_power_of_2(spans)), COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out
