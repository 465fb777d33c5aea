"""Triton's `keep_tokens`: one launch moves the kept rows of all tensors, whatever their widths and dtypes."""

# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import launch
from vtprune.kernels.words import widest_word

__all__ = ["gather_rows"]

# words that one program moves; 8 KiB where words have 8 bytes
_TILE = 1024
# tensors that one launch takes: its code grows with them
_MOST = 8


@triton.jit
def _copy_tile(
    source, out, index, pid, rows, count, groups, width, s_batch, s_group, s_token, i_batch, i_group,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # out [B, G, M, W] is contiguous; a row of it is (b, g, m)
    across = tl.cdiv(width, WIDTH)
    o_row = (pid // across) * ROWS + tl.arange(0, ROWS)
    o_word = (pid % across) * WIDTH + tl.arange(0, WIDTH)
    m_row = o_row < rows
    token = o_row % count
    group = (o_row // count) % groups
    batch = o_row // count // groups
    chosen = tl.load(index + batch * i_batch + group * i_group + token, mask=m_row, other=0)
    start = batch.to(tl.int64) * s_batch + group.to(tl.int64) * s_group + chosen.to(tl.int64) * s_token
    mask = m_row[:, None] & (o_word < width)[None, :]
    words = tl.load(source + start[:, None] + o_word[None, :], mask=mask)
    tl.store(out + o_row.to(tl.int64)[:, None] * width + o_word[None, :], words, mask=mask)


@triton.jit
def _gather_kernel(
    sources, outs, index, count, batch, i_batch, i_groups, groups, widths, s_batches, s_groups, s_tokens, ends,
    ROWS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """outs[t][b, g, m] = sources[t][b, g, index[b, g, m]]; programs ends[t - 1] .. ends[t] work on tensor t."""
    pid = tl.program_id(0)
    for t in tl.static_range(len(sources)):
        first = 0 if t == 0 else ends[t - 1]
        if (pid >= first) & (pid < ends[t]):
            _copy_tile(
                sources[t], outs[t], index, pid - first, batch * groups[t] * count, count, groups[t], widths[t],
                s_batches[t], s_groups[t], s_tokens[t], i_batch, i_groups[t], ROWS[t], WIDTHS[t],
            )  # fmt: skip


def gather_rows(tensors: Sequence[Tensor], index: Tensor, dim: int) -> list[Tensor]:
    """Keep rows of several tensors in one launch (of eight tensors at most).

    Rows move as words of 8, 4, 2 or 1 bytes, the widest that a tensor's rows, strides and start allow. Batch and token
    axes may have any strides (0 too); a tensor whose rows themselves are scattered in memory is copied first.

    Args:
        tensors: each [B or 1, ..., N, ...], tokens on axis `dim`.
        index: [B, M] int64, or [B, G, M] with a choice for each place on the axes between batch and tokens.
        dim: the token axis.

    Returns:
        one [B, ..., M, ...] for each tensor, contiguous.
    """
    if len(tensors) > _MOST:
        return [*gather_rows(tensors[:_MOST], index, dim), *gather_rows(tensors[_MOST:], index, dim)]
    index = index if index.stride(-1) == 1 else index.contiguous()
    batch, count = index.shape[0], index.shape[-1]
    outs = [t.new_empty(batch, *t.shape[1:dim], count, *t.shape[dim + 1 :]) for t in tensors]
    # a tensor without elements has nothing to move, and no row width
    pairs = [_as_words(t.expand(batch, *t.shape[1:]), o, dim) for t, o in zip(tensors, outs, strict=True) if o.numel()]
    if not pairs:
        return outs
    sources, targets = zip(*pairs, strict=True)
    groups, widths = [t.shape[1] for t in sources], [t.shape[3] for t in sources]
    across = [min(_TILE, triton.next_power_of_2(w)) for w in widths]
    down = [_TILE // w for w in across]
    tiles = [
        triton.cdiv(batch * g * count, r) * triton.cdiv(w, c)
        for g, r, w, c in zip(groups, down, widths, across, strict=True)
    ]
    ends = tuple(itertools.accumulate(tiles))
    i_group = index.stride(1) if index.dim() == 3 else 0
    strides = [tuple(t.stride(axis) for t in sources) for axis in range(3)]
    launch(
        _gather_kernel, (ends[-1],), tuple(sources), tuple(targets), index, count, batch, index.stride(0),
        (i_group,) * len(sources), tuple(groups), tuple(widths), *strides, ends, ROWS=tuple(down), WIDTHS=tuple(across),
    )  # fmt: skip
    return outs


def _as_words(source: Tensor, out: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both as [B, G, N, W] of the widest integer dtype that fits both."""
    between, after = math.prod(source.shape[1:dim]), math.prod(source.shape[dim + 1 :])
    source = source.reshape(source.shape[0], between, source.shape[dim], after)
    if after > 1 and source.stride(3) != 1:
        source = source.contiguous()
    # axes with a single entry may have any stride, and would stand in the way of wide words
    strides = [step if n > 1 else 0 for step, n in zip(source.stride()[:3], source.shape[:3], strict=True)]
    source = source.as_strided(source.shape, (*strides, 1))
    word = widest_word(source, after, strides)
    return source.view(word), out.reshape(out.shape[0], between, out.shape[dim], after).view(word)
