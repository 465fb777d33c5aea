"""Stand-ins for visual tokens, made of labels, with which the decoder learns before it sees pictures."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from vtprune.tiny.training.packing import COLOR_CLASSES, KIND_CLASSES, NO_REGION
from vtprune.tiny.training.vlms import TokenGrid
from vtprune.tiny.training.vlms.base import WIDTH

SYMBOL_SPREAD = 0.7


class SymbolTokens(nn.Module):
    """kind + colour + region + is-centre + token row + token column.

    Without `places` region, row and column are left out: the decoder must find them from rotary positions.
    """

    def __init__(self, grid: TokenGrid, places: bool) -> None:
        super().__init__()
        self.side = grid.side
        sizes = (KIND_CLASSES, COLOR_CLASSES, NO_REGION + 1, grid.center_classes)
        self.parts = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)
        for part in self.parts:
            nn.init.normal_(part.weight, 0, SYMBOL_SPREAD)  # type: ignore[arg-type]
        self.places = places
        if places:
            self._init_positions()

    def _init_positions(self) -> None:
        half = WIDTH // 2
        frequencies = torch.exp(-math.log(40.0) * torch.arange(half // 2) / (half // 2)) * 0.8
        angles = torch.arange(self.side)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1) * SYMBOL_SPREAD / 2
        table = torch.cat([waves, torch.zeros(self.side, WIDTH - waves.shape[1])], 1)
        self.row = nn.Parameter(table.clone())
        self.column = nn.Parameter(table.flip(1).clone())

    def tables(self) -> tuple[torch.Tensor, ...]:
        """Vectors by kind, colour, region and centre class."""
        return tuple(part.weight for part in self.parts)  # type: ignore[return-value]

    def forward(self, labels: np.ndarray) -> torch.Tensor:
        """[B, 5, V] token labels -> [B, V, D] tokens."""
        index = torch.from_numpy(labels).clamp(min=0)
        columns = (0, 1, 2, 4)
        chosen = [column for column in columns if self.places or column != 2]
        tokens: torch.Tensor = sum(self.parts[columns.index(column)](index[:, column]) for column in chosen)  # type: ignore[assignment]
        if not self.places:
            return tokens
        return tokens + self.row.repeat_interleave(self.side, 0) + self.column.repeat(self.side, 1)
