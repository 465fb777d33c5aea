"""The physical rows of a sequence that shrinks while it passes through the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """Which original position each physical row holds. Axes: B samples, N original positions, M rows.

    Attributes:
        position: [B, M] original position of each row; padding rows hold positions that no other row holds.
        filled: [B, M] False at padding. Padding that pruning adds lies in front.
        counts: rows of each sample that are not padding.
        untouched: row i holds position i. As many rows as positions do not say so: if one sample keeps everything, the
            rows of the others have moved behind new padding.
    """

    position: Tensor
    filled: Tensor
    counts: list[int]
    untouched: bool = False

    @classmethod
    def all_of(cls, real: Tensor, counts: list[int]) -> Rows:
        """Every position; `real` [B, N] is False at padding."""
        return cls(torch.arange(real.shape[1], device=real.device).expand_as(real), real, counts, True)

    @property
    def length(self) -> int:
        """M."""
        return self.position.shape[1]

    @property
    def dense(self) -> bool:
        """No row is padding."""
        return all(n == self.length for n in self.counts)

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        if self.position.device == device:
            return self
        return Rows(self.position.to(device), self.filled.to(device), self.counts, self.untouched)

    def keep(self, keep: Tensor, counts: list[int]) -> tuple[Rows, Tensor]:
        """The rows whose position is marked in `keep` [B, N], `counts` of them a sample, packed to the right.

        Returns:
            the new rows, and [B, M'] the index of each among the old ones.
        """
        width, device = max(counts), keep.device
        # a stable sort puts what leaves in front of what stays, both in order
        position = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, keep.shape[1] - width :]
        full = torch.full((len(counts),), width) - torch.tensor(counts)
        filled = torch.arange(width, device=device)[None] >= full.to(device)[:, None]
        return Rows(position, filled, counts), self.row_of(position, keep.shape[1])

    def row_of(self, position: Tensor, length: int) -> Tensor:
        """[B, K] row of each original position (0 where no row holds it); `length` is N."""
        if self.untouched:
            return position
        rows = torch.zeros(position.shape[0], length, dtype=torch.long, device=position.device)
        rows.scatter_(1, self.position, torch.arange(self.length, device=position.device).expand_as(self.position))
        return rows.gather(1, position)

    def last(self) -> Tensor:
        """[B] row of the last real token."""
        if bool(self.dense):
            return torch.full((len(self.counts),), self.length - 1, device=self.position.device)
        ramp = torch.arange(1, self.length + 1, device=self.position.device)
        return (self.filled * ramp).argmax(1)

    def scatter_back(self, hidden: Tensor, length: int) -> Tensor:
        """[B, M, D] -> [B, N, D] with zeros at positions that left."""
        rows = self.to(hidden.device)
        source = hidden if self.dense else hidden * rows.filled[..., None].to(hidden.dtype)
        full = hidden.new_zeros(hidden.shape[0], length, hidden.shape[-1])
        return full.scatter(1, rows.position[..., None].expand_as(hidden), source)
