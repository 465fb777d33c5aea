"""Triton's `compact_cache` in place: survivors move to the front of the memory that they lie in.

A program owns some adjacent words of all tokens of one sample and head, and nobody else touches those. It walks along
the survivors; since none comes from in front of its new place, what it has yet to read was not yet written.
"""

# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels.guard import launch
from vtprune.kernels.words import WORDS, widest_word

__all__ = ["shift_rows"]

# tokens that one step of the loop moves, words of each that a program owns: 32 bytes, a sector of a GPU's memory
_ROWS, _WIDTH = 256, 4
# tensors that one launch takes: its code grows with them
_MOST = 8


@triton.jit
def _shift_rows(
    memory, index, pid, count, groups, width, s_batch, s_group, s_token, s_word, i_batch, i_group,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, WIDTH)
    place = pid // across
    batch, group = place // groups, place % groups
    o_word = (pid % across) * WIDTH + tl.arange(0, WIDTH)
    p_word = memory + batch.to(tl.int64) * s_batch + group.to(tl.int64) * s_group + o_word.to(tl.int64) * s_word
    for start in range(0, count, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m_row = o_row < count
        chosen = tl.load(index + batch * i_batch + group * i_group + o_row, mask=m_row, other=0).to(tl.int64)
        mask = m_row[:, None] & (o_word < width)[None, :]
        words = tl.load(p_word[None, :] + chosen[:, None] * s_token, mask=mask)
        # no thread writes before all have read
        tl.debug_barrier()
        tl.store(p_word[None, :] + o_row.to(tl.int64)[:, None] * s_token, words, mask=mask)


@triton.jit
def _shift_kernel(
    tensors, index, count, i_batch, i_group, groups, widths, s_batches, s_groups, s_tokens, s_words, ends,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """tensors[t][b, g, m] = tensors[t][b, g, index[b, g, m]]; programs ends[t - 1] .. ends[t] work on tensor t."""
    pid = tl.program_id(0)
    for t in tl.static_range(len(tensors)):
        first = 0 if t == 0 else ends[t - 1]
        if (pid >= first) & (pid < ends[t]):
            _shift_rows(
                tensors[t], index, pid - first, count, groups, widths[t], s_batches[t], s_groups[t], s_tokens[t],
                s_words[t], i_batch, i_group, ROWS, WIDTH,
            )  # fmt: skip


def shift_rows(tensors: Sequence[Tensor], index: Tensor) -> None:
    """Move the tokens `index` of every tensor to its front, in place and in one launch (of eight tensors at most).

    Args:
        tensors: each [B, H, N, d], any strides.
        index: [B, M] or [B, H, M] int64 with index[..., m] >= m.
    """
    if len(tensors) > _MOST:
        shift_rows(tensors[_MOST:], index)
        tensors = tensors[:_MOST]
    index = index if index.stride(-1) == 1 else index.contiguous()
    batch, groups = tensors[0].shape[:2]
    words = [_as_words(t) for t in tensors]
    widths = [t.shape[3] for t in words]
    ends = tuple(itertools.accumulate(batch * groups * triton.cdiv(w, _WIDTH) for w in widths))
    strides = [tuple(t.stride(axis) for t in words) for axis in range(4)]
    i_group = index.stride(1) if index.dim() == 3 else 0
    # one stage: loads of later steps must stay behind the barrier
    launch(
        _shift_kernel, (ends[-1],), tuple(words), index, index.shape[-1], index.stride(0), i_group, groups,
        tuple(widths), *strides, ends, ROWS=_ROWS, WIDTH=_WIDTH, num_stages=1,
    )  # fmt: skip


def _as_words(tensor: Tensor) -> Tensor:
    """The same memory in the widest words that fit."""
    strides = [step if n > 1 else 0 for step, n in zip(tensor.stride(), tensor.shape, strict=True)]
    if strides[3] > 1:
        return tensor.view(WORDS[min(tensor.element_size(), 8)])
    word = widest_word(tensor, tensor.shape[3], strides[:3])
    return tensor.as_strided(tensor.shape, (*strides[:3], 1)).view(word)
