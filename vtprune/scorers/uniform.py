"""Uniform tokens: an even grid over each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.cells import centre_mask
from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.plan import Site

__all__ = ["Uniform"]


@METHODS.register("uniform")
@dataclass(frozen=True)
class Uniform(Scorer):
    """Keeps the centres of n equal cells of the image's grid, before the decoder. Looks at no content at all.

    A grid of R x C tokens is cut into g bands of rows, g = sqrt(n R / C) rounded, and each band into floor(n / g) or
    ceil(n / g) columns: exactly n cells that tile the grid, as square as n allows. Several images share n in proportion
    to their tokens (largest remainder; an image may get none if n is that small). If an earlier method has taken some
    tokens of an image, its grid is no longer full: then an even stride over the tokens that are left, in raster order.

    Cost: integer arithmetic, cached.
    """

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "centres of an even grid over the image, before the decoder (baseline)"
    site: ClassVar[Site | None] = Site("input")

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True at the cell centres."""
        return centre_mask(view)
