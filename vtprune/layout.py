"""Layout: which sequence positions are visual and which pixels each of them covers.

Axes: B samples, N sequence positions, V visual tokens of the sample that has most (samples with fewer are
padded at the end and `valid` is False there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageGrid", "Layout"]


@dataclass(frozen=True)
class ImageGrid:
    """How one image lies in the sequence: `rows` x `cols` tokens, row-major, one token a cell."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Number of visual tokens of the image."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one prefill are. Built once per prefill by the family.

    Attributes:
        position: [B, V] sequence position of each visual token, increasing.
        valid: [B, V] False where a sample has fewer than V visual tokens.
        image: [B, V] index of the image inside its sample.
        row, col: [B, V] cell of the token on its image's grid.
        grids: for each sample, the grid of each of its images.
        real: [B, N] True where the position is not padding.
        counts: visual tokens of each sample.
    """

    position: Tensor
    valid: Tensor
    image: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[ImageGrid, ...], ...]
    real: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_grids(cls, visual: Tensor, real: Tensor, grids: list[list[ImageGrid]]) -> Layout:
        """Lay row-major grids over the visual positions of each sample, in order.

        Args:
            visual: [B, N] True at visual positions.
            real: [B, N] True where the position is not padding.
            grids: the grids of each sample's images; their tokens sum to the sample's visual positions.
        """
        device = visual.device
        counts = [sum(g.tokens for g in sample) for sample in grids]
        width = max(counts, default=0)
        shape = (len(grids), width)
        image, row, col = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for b, sample in enumerate(grids):
            at = 0
            for i, grid in enumerate(sample):
                cell = torch.arange(grid.tokens)
                span = slice(at, at + grid.tokens)
                image[b, span], row[b, span], col[b, span] = i, cell // grid.cols, cell % grid.cols
                at += grid.tokens
        valid = torch.arange(width)[None, :] < torch.tensor(counts)[:, None]
        # a stable sort of "not visual" brings the visual positions to the front in order
        position = torch.argsort((~visual).to(torch.uint8), dim=1, stable=True)[:, :width]
        return cls(
            position=position,
            valid=valid.to(device),
            image=image.to(device),
            row=row.to(device),
            col=col.to(device),
            grids=tuple(tuple(sample) for sample in grids),
            real=real,
            counts=tuple(counts),
        )

    def box(self, sample: int, token: int) -> tuple[int, float, float, float, float]:
        """Which part of which image a visual token covers.

        Returns:
            (image, left, top, right, bottom): image index in the sample, the rest as fractions of its size.
        """
        image = int(self.image[sample, token])
        grid = self.grids[sample][image]
        row, col = int(self.row[sample, token]), int(self.col[sample, token])
        return image, col / grid.cols, row / grid.rows, (col + 1) / grid.cols, (row + 1) / grid.rows
