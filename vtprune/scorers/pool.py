"""Pooling: average each cell of an even grid into one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.cells import centre_mask, view_cells
from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.plan import Site

__all__ = ["Pool"]


@METHODS.register("pool")
@dataclass(frozen=True)
class Pool(Scorer):
    """Adaptive average pooling to exactly n tokens before the decoder: nothing is thrown away, all of it is blurred.

    The cells are those of `uniform` (see there), and a cell's mean takes the place and the position of its centre.
    Where the grid divides evenly this is `torch.nn.functional.adaptive_avg_pool2d`; where it does not, torch lets
    neighbouring windows overlap, while here every token counts in exactly one cell and n may be any number, not only a
    product of two sides. If an image's share of n is 0, its tokens are dropped.

    Cost: one pass over the tokens.
    """

    name: ClassVar[str] = "pool"
    summary: ClassVar[str] = "average of each cell of an even grid, before the decoder (baseline)"
    site: ClassVar[Site | None] = Site("input")
    merges: ClassVar[bool] = True

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True at the cell centres."""
        return centre_mask(view)

    def assign(self, view: TokenView, kept: Tensor) -> Tensor:
        """[B, V] the centre of each token's cell; padding owns itself."""
        owner = torch.arange(view.valid.shape[1]).repeat(view.valid.shape[0], 1)
        for b, cells in enumerate(view_cells(view)):
            owner[b, : len(cells.owner)] = torch.tensor(cells.owner, dtype=torch.long)
        return owner.to(view.valid.device)
