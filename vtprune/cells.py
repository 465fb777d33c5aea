"""Cells: a token grid cut into exactly n rectangles, one survivor each.

Arithmetic over ints, cached, the same on every device. The grid is cut into bands of rows, and each band into columns
of its own, so that any n from 1 to rows x cols works and the cells stay as square as n allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtprune.contract import TokenView

__all__ = ["Cells", "alive_tokens", "centre_mask", "grid_cells", "sample_cells", "split_in_proportion", "view_cells"]


@dataclass(frozen=True)
class Cells:
    """Disjoint rectangles that tile a grid (or the grids of a sample), in raster order.

    Attributes:
        centre: for each cell the number of the token in its middle, increasing.
        owner: for each token the centre of the cell it lies in; itself if it lies in none.
    """

    centre: tuple[int, ...]
    owner: tuple[int, ...]


@lru_cache(maxsize=256)
def grid_cells(rows: int, cols: int, n: int) -> Cells:
    """Cut a grid into `n` cells, 1 <= n <= rows * cols.

    The number of bands is the one that makes cells square, sqrt(n * rows / cols) rounded, held to what n allows; the
    n columns are dealt to the bands evenly. n = rows * cols gives every token a cell of its own.
    """
    bands = math.floor(math.sqrt(n * rows / cols) + 0.5)
    bands = min(max(bands, -(-n // cols)), min(n, rows))
    centre: list[int] = []
    owner = [0] * (rows * cols)
    for band in range(bands):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        columns = (band + 1) * n // bands - band * n // bands
        for column in range(columns):
            left, right = column * cols // columns, (column + 1) * cols // columns
            middle = (top + bottom) // 2 * cols + (left + right) // 2
            centre.append(middle)
            for row in range(top, bottom):
                owner[row * cols + left : row * cols + right] = [middle] * (right - left)
    return Cells(tuple(centre), tuple(owner))


def split_in_proportion(n: int, sizes: Sequence[int]) -> list[int]:
    """Deal `n` <= sum(sizes) items in proportion to `sizes`, by largest remainder; ties go to the earlier one.

    No share exceeds its size.
    """
    total = max(1, sum(sizes))
    shares = [n * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(n * sizes[i] % total), i))
    for i in by_remainder[: n - sum(shares)]:
        shares[i] += 1
    return shares


@lru_cache(maxsize=256)
def sample_cells(grids: tuple[tuple[int, int], ...], alive: tuple[int, ...], n: int) -> Cells:
    """Cells of a sample with several grids, dealt in proportion to their tokens.

    Args:
        grids: (rows, cols) of each grid.
        alive: tokens of each grid that are still there. One that has lost some is no longer full; it is
            taken as a single row of what is left, in raster order, so that its cells are runs of even length.
        n: cells, at most sum(alive). A grid whose share is 0 has none: its tokens own themselves and do not survive.

    Returns:
        Cells over the alive tokens, numbered through the sample.
    """
    centre: list[int] = []
    owner: list[int] = []
    for (rows, cols), tokens, share in zip(grids, alive, split_in_proportion(n, alive), strict=True):
        start = len(owner)
        if share == 0:
            owner += range(start, start + tokens)
            continue
        cells = grid_cells(rows, cols, share) if tokens == rows * cols else grid_cells(1, tokens, share)
        centre += [start + token for token in cells.centre]
        owner += [start + token for token in cells.owner]
    return Cells(tuple(centre), tuple(owner))


def view_cells(view: TokenView) -> list[Cells]:
    """The cells of each sample of a view, over its V axis: `view.keep[b]` of them, or one a token if fewer are left."""
    return [
        sample_cells(grids, alive, min(keep, sum(alive)))
        for grids, alive, keep in zip(view.grids, alive_tokens(view), view.keep.tolist(), strict=True)
    ]


def alive_tokens(view: TokenView) -> list[tuple[int, ...]]:
    """For each sample of a view how many tokens of each of its grids are still there."""
    alive = []
    for b, (grids, count) in enumerate(zip(view.grids, view.valid.sum(1).tolist(), strict=True)):
        mine = [rows * cols for rows, cols in grids]
        if count != sum(mine):
            mine = torch.bincount(view.grid[b, :count], minlength=len(grids)).tolist()
        alive.append(tuple(mine))
    return alive


def centre_mask(view: TokenView) -> Tensor:
    """[B, V] bool, True at the centres of the cells of a view."""
    mask = torch.zeros(view.valid.shape, dtype=torch.bool)
    for b, cells in enumerate(view_cells(view)):
        mask[b, list(cells.centre)] = True
    return mask.to(view.valid.device)
