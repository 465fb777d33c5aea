"""Triton's `merge_tokens`: every row adds up its own members, so that no sum depends on the order of programs."""

# pyright: basic, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import launch

__all__ = ["merge", "merge_gradients"]

# tokens that one step takes, and elements of each
_MEMBERS, _WIDTH = 4, 512


@triton.jit
def _merge_kernel(
    hidden, share, order, starts, out, total, length, width, s_batch, s_token, s_width,
    MEMBERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[b, v] = sum_j share[j] hidden[j] / sum_j share[j] over j in order[b, starts[b, v] : starts[b, v + 1]]."""
    row, i_width = tl.program_id(0), tl.program_id(1)
    batch, token = row // length, row % length
    o_width = i_width * WIDTH + tl.arange(0, WIDTH)
    m_width = o_width < width
    p_hidden = hidden + batch.to(tl.int64) * s_batch + o_width.to(tl.int64) * s_width
    first = tl.load(starts + batch * (length + 1) + token)
    last = tl.load(starts + batch * (length + 1) + token + 1)
    sums = tl.zeros([MEMBERS, WIDTH], tl.float32)
    shares = tl.zeros([MEMBERS], tl.float32)
    for at in range(first, last, MEMBERS):
        o_member = at + tl.arange(0, MEMBERS)
        m_member = o_member < last
        member = tl.load(order + batch * length + o_member, mask=m_member, other=0)
        part = tl.load(share + batch * length + member, mask=m_member, other=0.0)
        mask = m_member[:, None] & m_width[None, :]
        states = tl.load(p_hidden[None, :] + member.to(tl.int64)[:, None] * s_token, mask=mask, other=0.0)
        sums += states.to(tl.float32) * part[:, None]
        shares += part
    weight = tl.sum(shares, 0)
    whole = tl.zeros([WIDTH], tl.float32) + weight
    alone = whole <= 0.0
    own = tl.load(p_hidden + token.to(tl.int64) * s_token, mask=m_width & alone, other=0.0)
    # rounded as torch rounds, so that what owns itself does not change a bit
    mean = tl.div_rn(tl.sum(sums, 0), tl.where(alone, 1.0, whole))
    merged = tl.where(alone, own, mean.to(own.dtype))
    tl.store(out + row.to(tl.int64) * width + o_width, merged, mask=m_width)
    tl.store(total + row, weight, mask=i_width == 0)


@triton.jit
def _merge_backward_kernel(
    grad, hidden, owner, valid, share, total, d_hidden, dots, rows, length, width, s_batch, s_token, s_width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_hidden[j] = share[j] g[o] + grad[j] where j owns nothing, dots[j] = g[o] . hidden[j].

    o is the owner of j and g = grad / total. A gather, because a token has one owner.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = row < rows
    batch, token = row // length, row % length
    counts = m_row & (tl.load(valid + row, mask=m_row, other=0) != 0)
    target = batch * length + tl.load(owner + row, mask=counts, other=0).to(tl.int32)
    whole = tl.load(total + target, mask=counts, other=0.0)
    part = tl.load(share + row, mask=m_row, other=0.0)
    alone = m_row & (tl.load(total + row, mask=m_row, other=1.0) <= 0.0)
    counts = counts & (whole > 0.0)
    inverse = tl.where(counts, 1.0 / tl.where(counts, whole, 1.0), 0.0)
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        o_width = (start + tl.arange(0, WIDTH))[None, :]
        m_width = o_width < width
        mask = counts[:, None] & m_width
        there = target.to(tl.int64)[:, None] * width + o_width
        above = tl.load(grad + there, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        p_hidden = hidden + (batch.to(tl.int64) * s_batch + token.to(tl.int64) * s_token)[:, None]
        state = tl.load(p_hidden + o_width * s_width, mask=mask, other=0.0).to(tl.float32)
        products += above * state
        here = row.to(tl.int64)[:, None] * width + o_width
        passed = tl.load(grad + here, mask=alone[:, None] & m_width, other=0.0).to(tl.float32)
        tl.store(d_hidden + here, above * part[:, None] + passed, mask=m_row[:, None] & m_width)
    tl.store(dots + row, tl.sum(products, 1), mask=m_row)


def merge(hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Means [B, V, D] and [B, V] fp32 the weight behind each.

    Args:
        hidden: [B, V, D] of any strides.
        owner: [B, V] int64.
        valid: [B, V] bool.
        share: [B, V] fp32 weights, 0 at padding.
    """
    batch, length, width = hidden.shape
    # padding is sorted behind the last owner, so that nobody reads it
    chosen, order = owner.masked_fill(~valid, length).sort(dim=1, stable=True)
    edges = torch.arange(length + 1, device=owner.device).expand(batch, -1).contiguous()
    starts = torch.searchsorted(chosen, edges, out_int32=True)
    out, total = hidden.new_empty(hidden.shape), share.new_empty(batch, length)
    block = min(_WIDTH, triton.next_power_of_2(width))
    launch(
        _merge_kernel, (batch * length, triton.cdiv(width, block)), hidden, share.contiguous(), order.int(), starts,
        out, total, length, width, *hidden.stride(), MEMBERS=_MEMBERS, WIDTH=block,
    )  # fmt: skip
    return out, total


def merge_gradients(
    grad: Tensor, hidden: Tensor, owner: Tensor, valid: Tensor, share: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `hidden` [B, V, D] in its dtype, and [B, V] fp32 the product of each token with its owner's gradient.

    `grad` is that of the means; the rest as in `merge`, and what it returned.
    """
    batch, length, width = hidden.shape
    d_hidden, dots = hidden.new_empty(hidden.shape), share.new_empty(batch, length)
    launch(
        _merge_backward_kernel, (triton.cdiv(batch * length, _MEMBERS),), grad.contiguous(), hidden,
        owner.contiguous(), valid.contiguous().view(torch.uint8), share.contiguous(), total, d_hidden, dots,
        batch * length, length, width, *hidden.stride(), ROWS=_MEMBERS,
        WIDTH=min(_WIDTH, triton.next_power_of_2(width)),
    )  # fmt: skip
    return d_hidden, dots
