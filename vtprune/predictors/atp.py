"""Thresholds of ATP-LLaVA: how much redundancy and how fine a grid this very prompt needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.errors import ShapeError
from vtprune.predictors.checkpoint import Predictor

__all__ = ["Thresholds"]


class Thresholds(Predictor):
    """A module behind each of some decoder layers: z = Linear(2 -> width), two heads sigmoid(Linear(width -> 1)).

    Equations 6 to 8 of ATP-LLaVA (arXiv 2412.00447) as two independent re-implementations have them; there width is
    the decoder's.

    Args:
        fingerprint: of the model, see `Fingerprint.to_dict`.
        after: 0-based decoder layers behind which the modules sit, increasing.
        width: of z.
        scores: knobs of `ATP` that say what the scores are; the thresholds mean nothing with others.
    """

    kind: ClassVar[str] = "atp"

    def __init__(
        self,
        fingerprint: Mapping[str, Any],
        after: Sequence[int],
        width: int,
        scores: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(fingerprint)
        self.after = tuple(after)
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in (scores or {}).items()}
        self.knobs = {"after": self.after, **given}
        if not self.after or width < 1 or any(a >= b for a, b in zip(self.after, self.after[1:], strict=False)):
            raise ShapeError(f"thresholds need increasing layers and width >= 1, got {self.after} and {width}.")
        self.inner = nn.ModuleList(nn.Linear(2, width) for _ in self.after)
        self.redundancy = nn.ModuleList(nn.Linear(width, 1) for _ in self.after)
        self.spatial = nn.ModuleList(nn.Linear(width, 1) for _ in self.after)

    def forward(self, layer: int, means: Tensor) -> Tensor:
        """[B, 2] mean self and cross scores behind decoder layer `layer` -> [B, 2] both thresholds, in (0, 1)."""
        place = self.after.index(layer)
        inner = self.inner[place](means)
        return torch.cat([self.redundancy[place](inner), self.spatial[place](inner)], 1).sigmoid()
