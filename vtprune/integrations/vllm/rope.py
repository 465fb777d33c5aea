"""M-RoPE positions of images that lost tokens: exact, also over chunks, cache hits and preemption. No vLLM here.

vLLM lays out a request's positions before any image is seen. Those of text follow from the sizes of the images alone,
so they are right from the start; those of the B tokens of an image are known once it is encoded, travel with the
embeddings in extra channels, and are filled in before the tokens run.

Axes: T tokens of the (shortened) prompt, B tokens of an image in it, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHANNELS", "Span", "fill_positions", "restored_prompt", "with_cells", "without_cells"]

CHANNELS = 4
"""Row and column of a token's cell, each as two digits of base 128, which bfloat16 holds exactly."""

_BASE = 128


@dataclass(frozen=True)
class Span:
    """An image in a prompt: `length` placeholders from `start` on, of the `full` it had."""

    start: int
    length: int
    full: int


def with_cells(embeddings: Tensor, kept: Tensor, columns: int) -> Tensor:
    """[B, D] and which tokens they are [B], of a grid with so many columns -> [B, D + CHANNELS]."""
    row, column = kept // columns, kept % columns
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], 1)
    return torch.cat([embeddings, digits.to(embeddings)], 1)


def without_cells(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `with_cells`: [B, D], and [2, B] int64 rows and columns."""
    digits = embeddings[:, -CHANNELS:].round().long()
    return embeddings[:, :-CHANNELS], torch.stack(
        [digits[:, 0] * _BASE + digits[:, 1], digits[:, 2] * _BASE + digits[:, 3]]
    )


def restored_prompt(tokens: Sequence[int], spans: Sequence[Span]) -> tuple[list[int], list[bool], list[Span]]:
    """The prompt as it was before tokens left.

    Args:
        tokens: [T] ids.
        spans: the images, in order.

    Returns:
        the ids with every placeholder back; for each of them whether it stands in `tokens` (of an image the first
        ones, as nobody knows yet which stay); the images in the longer prompt.
    """
    whole: list[int] = []
    there: list[bool] = []
    moved: list[Span] = []
    done = 0
    for span in spans:
        whole += tokens[done : span.start]
        there += [True] * (span.start - done)
        moved.append(Span(len(whole), span.full, span.full))
        whole += [tokens[span.start]] * span.full
        there += [True] * span.length + [False] * (span.full - span.length)
        done = span.start + span.length
    whole += tokens[done:]
    there += [True] * (len(tokens) - done)
    return whole, there, moved


def fill_positions(positions: Tensor, visual: Tensor, first: int, cells: Tensor) -> Tensor:
    """Give tokens of images their places.

    Args:
        positions: [3, T] time, row and column; right at text.
        visual: [T] True at placeholders; text stands between two images.
        first: tokens before this one have run.
        cells: [2, K] rows and columns of the first K placeholders from `first` on.

    Returns:
        [3, T] new positions.
    """
    at = torch.arange(positions.shape[1], device=positions.device)
    starts = visual.clone()
    starts[1:] &= ~visual[:-1]
    begin = torch.where(starts, at, 0).cummax(0).values
    # an image's origin is one behind the text before it
    origin = torch.where(begin > 0, positions[0, (begin - 1).clamp(min=0)] + 1, 0)
    mine = at[visual & (at >= first)][: cells.shape[1]]
    cells = cells.to(positions)
    filled = positions.clone()
    filled[:, mine] = origin[mine] + torch.cat([torch.zeros_like(cells[:1]), cells])
    return filled
