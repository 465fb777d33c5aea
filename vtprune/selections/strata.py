"""A quota for each image, grid or window, and a selection inside each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.cells import split_in_proportion
from vtprune.errors import PlanError
from vtprune.frames import FrameMap
from vtprune.rules import SELECTIONS, Selection, require_scores, top_k_mask
from vtprune.views import TokenView

__all__ = ["Strata", "split_by_weight"]


@SELECTIONS.register("strata")
@dataclass(frozen=True)
class Strata(Selection):
    """Deals the survivors to parts of the sample first, then chooses inside each part.

    Without it all images of a sample compete for one budget (pooled); `by="image"` gives every image its share.

    Attributes:
        by: what a part is: an image (or video), a frame of a video (or a still image), a grid (crop, tile, the
            patches of a frame), or a window of a grid.
        share: quotas in proportion to the tokens alive ("tokens", largest remainder) or to the mean score of each part
            ("score", negative means count as 0: `split_by_weight`). No part gets more than it has.
        rows, cols: windows down and across a grid, with `by="window"`.
        within: name of the selection inside each part; None is the best by score, the first where nobody scores.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "strata"
    summary: ClassVar[str] = "a quota for each image, frame, crop or window"

    by: Literal["image", "frame", "grid", "window"] = "image"
    share: Literal["tokens", "score"] = "tokens"
    rows: int = 4
    cols: int = 4
    within: str | None = None

    def __post_init__(self) -> None:
        if self.by not in ("image", "frame", "grid", "window"):
            raise PlanError(f"strata by must be 'image', 'frame', 'grid' or 'window', got {self.by!r}.")
        if self.share not in ("tokens", "score"):
            raise PlanError(f"strata share must be 'tokens' or 'score', got {self.share!r}.")
        for knob in ("rows", "cols"):
            value = getattr(self, knob)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"strata {knob} must be an int >= 1, got {value!r}.")
        if self.within is not None:
            inner = SELECTIONS[self.within] if isinstance(self.within, str) else None
            if inner is None or inner.adaptive or inner is Strata:
                raise PlanError(
                    f"strata within must name a selection with a fixed count (topk, maxmin, dpp), got {self.within!r}."
                )

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return self.share == "score" or (self.within is not None and SELECTIONS[self.within]().needs_scores)

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        part = self._parts(view)
        number = int(part.max()) + 1 if part.numel() else 0
        if number == 0:
            return view.valid.clone()
        sizes = torch.zeros(part.shape[0], number, device=part.device, dtype=torch.long)
        sizes.scatter_add_(1, part, view.valid.long())
        quotas = self._quotas(view, part, sizes, scores)
        # [B, parts, W] tokens of each part in order: invalid ones sort behind all parts
        order = part.masked_fill(~view.valid, number).argsort(dim=1, stable=True)
        inside = torch.arange(int(sizes.max()), device=part.device)
        place = ((sizes.cumsum(1) - sizes)[..., None] + inside).clamp(max=part.shape[1] - 1)
        there = (inside < sizes[..., None]).flatten(0, 1)
        index = order.gather(1, place.flatten(1)).view(-1, len(inside))
        chosen = self._inside(view, scores, index, there, quotas.flatten()) & there
        mask = torch.zeros(view.valid.shape, dtype=torch.long, device=part.device)
        mask.scatter_add_(1, index.view(len(part), -1), chosen.view(len(part), -1).long())
        return mask > 0

    def _inside(self, view: TokenView, scores: Tensor | None, index: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """[B * parts, W] what is chosen; every part is a row of its own."""
        sample = torch.arange(len(index), device=index.device) // max(1, len(index) // max(1, len(view.valid)))
        row = sample[:, None]
        picked = None if scores is None else scores[row, index]
        if self.within is None:
            order = -torch.arange(index.shape[1], device=index.device).float().expand(index.shape)
            return top_k_mask(order if picked is None else picked, keep, valid)
        inner = dataclasses.replace(
            view,
            hidden=view.hidden[row, index],
            valid=valid,
            keep=keep,
            memory={},
            **{name: getattr(view, name)[row, index] for name in ("original", "grid", "row", "col")},
            size=None if view.size is None else view.size[row, index],
        )
        return SELECTIONS[self.within]().select(inner, picked)

    def _parts(self, view: TokenView) -> Tensor:
        """[B, V] number of the part that each token lies in; 0 at padding."""
        device, width = view.grid.device, max((len(g) for g in view.grids), default=0)
        if not width:
            return torch.zeros_like(view.grid)
        if self.by == "frame":
            return FrameMap.of(view).frame
        if self.by == "grid":
            return view.grid.masked_fill(~view.valid, 0)
        if self.by == "image":
            images = [list(row) + [0] * (width - len(row)) for row in view.images]
            return torch.tensor(images, device=device).gather(1, view.grid).masked_fill(~view.valid, 0)
        sides = torch.tensor([[*g, *[(1, 1)] * (width - len(g))] for g in view.grids], device=device)
        down, across = (sides[..., axis].gather(1, view.grid) for axis in (0, 1))
        window = view.row * self.rows // down * self.cols + view.col * self.cols // across
        return (view.grid * self.rows * self.cols + window).masked_fill(~view.valid, 0)

    def _quotas(self, view: TokenView, part: Tensor, sizes: Tensor, scores: Tensor | None) -> Tensor:
        """[B, parts] survivors of each."""
        keep = view.keep.minimum(view.valid.sum(1)).tolist()
        if self.share == "tokens":
            quotas = [split_in_proportion(n, row) for n, row in zip(keep, sizes.tolist(), strict=True)]
        else:
            score = require_scores(scores, self.name).double().masked_fill(~view.valid, 0.0)
            mean = torch.zeros(sizes.shape, dtype=torch.float64, device=part.device).scatter_add(1, part, score)
            mean = (mean / sizes.clamp(min=1)).clamp(min=0.0).tolist()
            quotas = [split_by_weight(n, w, row) for n, w, row in zip(keep, mean, sizes.tolist(), strict=True)]
        return torch.tensor(quotas, device=part.device)


def split_by_weight(n: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Deal `n` <= sum(sizes) items in proportion to `weights`, no share above its size.

    The floor of each share first, then one more to the heaviest until all are dealt; what does not fit is dealt again
    to those that have room, in proportion to their weights (to their room, if they weigh nothing).
    """
    shares = [0] * len(sizes)
    left = n
    while left:
        room = [size - share for size, share in zip(sizes, shares, strict=True)]
        weigh = [w if r else 0.0 for w, r in zip(weights, room, strict=True)]
        total = math.fsum(weigh)
        if total <= 0.0 or not math.isfinite(total):
            weigh = [float(r) for r in room]
            total = float(sum(room))
        deal = [min(r, math.floor(left * w / total)) for w, r in zip(weigh, room, strict=True)]
        if not any(deal):
            heaviest = sorted((i for i, r in enumerate(room) if r), key=lambda i: (-weigh[i], i))[:left]
            deal = [int(i in heaviest) for i in range(len(sizes))]
        shares = [a + b for a, b in zip(shares, deal, strict=True)]
        left -= sum(deal)
    return shares
