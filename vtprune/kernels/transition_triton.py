"""Triton's `transition`: three sums of a token in one read of its two states."""

# pyright: basic, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import launch
from vtprune.kernels.transition import EPSILON, TINY

__all__ = ["measure"]

# elements of a token that one step of the loop takes, and tokens of a program
_WIDTH, _ROWS = 512, 4


@triton.jit
def _transition_kernel(
    before, after, magnitude, cosine, rows, length, width, x_batch, x_token, x_width, y_batch, y_token, y_width,
    TINY: tl.constexpr, EPSILON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See `vtprune.kernels.transition`; the sums of a token are carried in fp32 along its width."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    batch, token = (o_row // length).to(tl.int64), (o_row % length).to(tl.int64)
    p_before = before + (batch * x_batch + token * x_token)[:, None]
    p_after = after + (batch * y_batch + token * y_token)[:, None]
    one = tl.zeros([ROWS, WIDTH], tl.float32)
    two = tl.zeros([ROWS, WIDTH], tl.float32)
    inner = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        o_width = (start + tl.arange(0, WIDTH))[None, :]
        mask = m_row[:, None] & (o_width < width)
        x = tl.load(p_before + o_width * x_width, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_after + o_width * y_width, mask=mask, other=0.0).to(tl.float32)
        one += x * x
        two += y * y
        inner += x * y
    norm = tl.maximum(tl.sqrt(tl.sum(one, 1)), TINY)
    span = tl.sqrt(tl.sum(two, 1))
    tl.store(magnitude + o_row, span / norm, mask=m_row)
    tl.store(cosine + o_row, tl.sum(inner, 1) / tl.maximum(norm * span, EPSILON), mask=m_row)


def measure(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and cosine, [B, N] fp32 each, of states [B, N, D] of any strides."""
    batch, length, width = before.shape
    magnitude, cosine = (before.new_empty((batch, length), dtype=torch.float32) for _ in range(2))
    launch(
        _transition_kernel, (triton.cdiv(batch * length, _ROWS),), before, after, magnitude, cosine, batch * length,
        length, width, *before.stride(), *after.stride(), TINY=TINY, EPSILON=EPSILON, ROWS=_ROWS,
        WIDTH=min(_WIDTH, triton.next_power_of_2(width)),
    )  # fmt: skip
    return magnitude, cosine
