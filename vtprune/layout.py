"""Layout: which sequence positions are visual and which pixels each of them covers.

A sample holds images (or videos); an image is one or more grids of tokens: the picture itself, its crops, the frames of
a video. Axes: B samples, N sequence positions, V visual tokens of the sample that has most (samples with fewer are
padded at the end and `valid` is False there).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.frames import opening_tokens

__all__ = ["ImageGrid", "Layout", "opening"]

Region = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageGrid:
    """A block of visual tokens that covers a whole image or frame: `rows` x `cols` tokens, row-major, one a cell.

    Attributes:
        rows, cols: tokens, newline tokens included.
        frame: index of the (first) video frame, None in a still image.
        newline: the last column holds tokens that cover no pixels: row ends, a frame's CLS token.
        assumed: rows and columns were guessed from the number of tokens, so that `Layout.box` is a guess too.
    """

    rows: int
    cols: int
    frame: int | None = None
    newline: bool = False
    assumed: bool = False

    @property
    def tokens(self) -> int:
        """Number of visual tokens of the grid."""
        return self.rows * self.cols


def opening(images: Sequence[int], grids: Sequence[ImageGrid]) -> int:
    """Tokens of a sample that lie where no earlier frame of their film has one; `images` as in `Layout`."""
    frames, sides = tuple(g.frame for g in grids), tuple((g.rows, g.cols) for g in grids)
    return opening_tokens(tuple(images), frames, sides)


@dataclass(frozen=True)
class Layout:
    """Where the visual tokens of one prefill are. Built once per prefill from what the family reads.

    Attributes:
        position: [B, V] sequence position of each visual token, increasing.
        valid: [B, V] False where a sample has fewer than V visual tokens.
        grid: [B, V] index of the grid inside the sample.
        row, col: [B, V] cell of the token on its grid.
        grids: for each sample its grids, in the order of their tokens.
        images: for each sample and grid the index of the image inside the sample.
        real: [B, N] True where the position is not padding.
        counts: visual tokens of each sample.
    """

    position: Tensor
    valid: Tensor
    grid: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[ImageGrid, ...], ...]
    images: tuple[tuple[int, ...], ...]
    real: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_images(cls, visual: Tensor, real: Tensor, images: Sequence[Sequence[Sequence[ImageGrid]]]) -> Layout:
        """Lay row-major grids over the visual positions of each sample, in order.

        Args:
            visual: [B, N] True at visual positions.
            real: [B, N] True where the position is not padding.
            images: for each sample, for each image its grids; their tokens sum to the sample's visual positions.
        """
        device = visual.device
        grids = tuple(tuple(grid for image in sample for grid in image) for sample in images)
        owners = tuple(tuple(i for i, image in enumerate(sample) for _ in image) for sample in images)
        counts = [sum(g.tokens for g in sample) for sample in grids]
        width = max(counts, default=0)
        shape = (len(grids), width)
        number, row, col = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for b, sample in enumerate(grids):
            at = 0
            for i, grid in enumerate(sample):
                cell = torch.arange(grid.tokens)
                span = slice(at, at + grid.tokens)
                number[b, span], row[b, span], col[b, span] = i, cell // grid.cols, cell % grid.cols
                at += grid.tokens
        valid = torch.arange(width)[None, :] < torch.tensor(counts)[:, None]
        # a stable sort of "not visual" brings the visual positions to the front in order
        position = torch.argsort((~visual).to(torch.uint8), dim=1, stable=True)[:, :width]
        return cls(
            position=position,
            valid=valid.to(device),
            grid=number.to(device),
            row=row.to(device),
            col=col.to(device),
            grids=grids,
            images=owners,
            real=real,
            counts=tuple(counts),
        )

    @property
    def opening(self) -> tuple[int, ...]:
        """For each sample its tokens that lie where no earlier frame of their film has one: see `Geometry`."""
        return tuple(opening(images, grids) for images, grids in zip(self.images, self.grids, strict=True))

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        if self.real.device == device:
            return self
        return dataclasses.replace(
            self,
            position=self.position.to(device),
            valid=self.valid.to(device),
            grid=self.grid.to(device),
            row=self.row.to(device),
            col=self.col.to(device),
            real=self.real.to(device),
        )

    def box(self, sample: int, token: int) -> tuple[int, int | None, Region] | None:
        """Which part of which image a visual token covers; None for a token that covers none.

        Returns:
            (image, frame, (left, top, right, bottom)): index of the image in the sample, of its video frame (None in a
            still image), and the covered part as fractions of the image's size.
        """
        number = int(self.grid[sample, token])
        grid = self.grids[sample][number]
        row, col = int(self.row[sample, token]), int(self.col[sample, token])
        across = grid.cols - int(grid.newline)
        if col >= across:
            return None
        part = (col / across, row / grid.rows, (col + 1) / across, (row + 1) / grid.rows)
        return self.images[sample][number], grid.frame, part
