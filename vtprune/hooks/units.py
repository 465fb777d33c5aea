"""What a vision tower encodes: units that attend to themselves, and which of their patches make each visual token.

Axes: V cells of a unit, c patches of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Medium", "Packing", "Tower", "Unit", "blocks", "raster", "table"]

Packing = Literal["padded", "segments", "mask"]
"""How a tower carries its units: each as a row of a batch, [U, M, D]; all in one sequence, [R, D], whose `cu_seqlens`
say where each ends; or all in one sequence, [1, R, D], with a mask that hides them from each other."""


@dataclass(frozen=True)
class Tower:
    """The vision side of a model, where the family opens it.

    Attributes:
        module: runs the blocks.
        blocks: transformer blocks; `Family.attention(block)` is each one's attention module.
        projector: maps rows to embeddings, a row a visual token. Where `packing` is "segments" it is part of the tower
            and gets the patches that are left; elsewhere it comes after the host has laid out all patches again.
        packing: how the tower carries its units.
        taps: copies of the projector for earlier blocks (DeepStack).
        entrance: the module that gets those rows first, where the projector itself merges patches before it.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    projector: nn.Module
    packing: Packing = "padded"
    taps: tuple[nn.Module, ...] = ()
    entrance: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Unit:
    """An image, a crop or a frame: its patches attend to each other and to nothing else.

    A cell is what becomes one visual token: a patch, or the square of patches that the host merges into one.

    Attributes:
        grid: (rows, cols) of the cells that reach the decoder.
        patches: patches that enter the tower, those of no cell included.
        outputs: rows that the projector gives for it, those that never reach the decoder included.
        rows: [V, c] the patches of each cell, as the tower orders them.
        output: [V] which of the projector's rows each cell becomes.
        lead: rows that the projector gives before those of the patches and that stay whatever leaves (CLS of a frame).
        windows: patches of each window in order, where some blocks attend in windows.
    """

    grid: tuple[int, int]
    patches: int
    outputs: int
    rows: Tensor
    output: Tensor
    lead: int = 0
    windows: tuple[int, ...] = ()

    @property
    def cells(self) -> int:
        """V."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Medium:
    """One image or video: the units that the tower makes of it, in order.

    Attributes:
        units: its crops or frames.
        others: its visual tokens that no patches make (newlines, CLS tokens of frames); they stay whatever the tower
            drops.
        mixed: why no visual token is made of patches of its own, so that the tower cannot be cut; "" if each is.
    """

    units: tuple[Unit, ...]
    others: int = 0
    mixed: str = ""

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return sum(unit.cells for unit in self.units) + self.others


@lru_cache(maxsize=128)
def raster(rows: int, cols: int, merge: int = 1, part: tuple[int, int, int, int] | None = None) -> Unit:
    """A unit whose patches, cells and projector rows come row by row.

    Args:
        rows, cols: its patches; rows and columns that fill no whole cell belong to none.
        merge: patches along the side of a cell.
        part: (top, left, rows, cols) of the cells that reach the decoder; None is all.
    """
    down, across = rows // merge, cols // merge
    top, left, high, wide = part or (0, 0, down, across)
    cell = torch.arange(down * across).view(down, across)[top : top + high, left : left + wide].flatten()
    corner = cell // across * merge * cols + cell % across * merge
    inside = (torch.arange(merge)[:, None] * cols + torch.arange(merge)).flatten()
    return Unit((high, wide), rows * cols, down * across, corner[:, None] + inside, cell)


def blocks(rows: int, cols: int, cell: int, order: Tensor | None = None, windows: tuple[int, ...] = ()) -> Unit:
    """A unit in which the patches of a cell follow each other.

    Args:
        rows, cols: its cells.
        cell: patches of a cell.
        order: [V] which cell comes first, second, ... in the tower; None is row by row.
        windows: see `Unit`.
    """
    number = rows * cols
    place = torch.arange(number) if order is None else torch.argsort(order)
    return Unit((rows, cols), number * cell, number, place[:, None] * cell + torch.arange(cell), place, windows=windows)


def table(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """[U, V, ...] one row for each tensor [V_u, ...], padded with zeros."""
    if all(part is parts[0] for part in parts):
        return parts[0].to(device).expand(len(parts), *parts[0].shape)
    return pad_sequence(list(parts), batch_first=True).to(device)
