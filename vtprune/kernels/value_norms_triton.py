"""Triton's `value_norms`: the values of a token are read head by head and leave one number."""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import launch

__all__ = ["norms"]

# tokens of a program
_ROWS = 8


@triton.jit
def _norms_kernel(
    value, column, out, rows, count, heads, width, s_batch, s_head, s_token, s_width,
    MEAN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[b, v] = sum_d |mean_h value[b, h, column[b, v], d]|, or sum_hd |value[...]|."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    token = tl.load(column + o_row, mask=m_row, other=0).to(tl.int64)
    o_width = tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_width < width)[None, :]
    start = (o_row // count).to(tl.int64) * s_batch + token * s_token
    p_value = value + start[:, None] + o_width[None, :] * s_width
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in range(heads):
        b_value = tl.load(p_value, mask=mask, other=0.0).to(tl.float32)
        sums += b_value if MEAN else tl.abs(b_value)
        p_value += s_head
    if MEAN:
        sums = tl.abs(sums) / heads
    tl.store(out + o_row, tl.sum(sums, 1), mask=m_row)


def norms(value: Tensor, column: Tensor, norm: str) -> Tensor:
    """[B, V] fp32; arguments as in `vtprune.kernels.value_norms.value_norms`, `value` of any strides."""
    heads, width = value.shape[1], value.shape[3]
    out = value.new_empty(column.shape, dtype=torch.float32)
    launch(
        _norms_kernel, (triton.cdiv(column.numel(), _ROWS),), value, column.contiguous(), out, column.numel(),
        column.shape[1], heads, width, *value.stride(), MEAN=norm == "head_mean", ROWS=_ROWS,
        WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return out
