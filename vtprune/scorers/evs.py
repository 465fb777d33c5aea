"""EVS: what has changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.errors import BudgetError
from vtprune.frames import FrameMap, ranks_within
from vtprune.plan import Plan, Site, Stage
from vtprune.rules import top_k_mask
from vtprune.similarity import STEP, cosine_distance, unit_states

__all__ = ["EVS"]

# above every distance, which ends at 2
_ALWAYS = 3.0


@METHODS.register("evs")
@dataclass(frozen=True)
class EVS(Scorer):
    """Drops tokens that look like the one at their place in the frame before, before the decoder. For videos.

    Paper: Efficient Video Sampling, arXiv 2510.14624. A token scores 1 - cos(x_t, x_{t-1}) with the projected token at
    the same place one frame earlier; a token without such a forerunner is always kept. That is the first frame of each
    video, the newline behind one, and every token of a still image. Among equal scores the earlier token stays.
    The paper compares the pixels of patches; serving engines, and this, compare the embeddings that the decoder gets.
    Several videos of a prompt are pruned at one rate R, as if each were alone: of a video with V tokens the
    max(first frame, R V) best stay, with the R at which all of them meet the budget (to one token). `evs/topk` lets
    them compete by score instead.
    Where an earlier stage has taken the token of the frame before, the nearest earlier frame that has one counts.

    What a budget can reach: no less than first frames and still images hold. Below, a BudgetError names that number.
    So a prompt of still images alone cannot be pruned: it is refused, and not thinned by some other rule under this
    name. That includes families whose processors hand over the frames of a video as images (InternVL, Idefics3), and
    the family `generic`, which takes a video for one image.
    "Frame" is what the model has a grid of tokens for: a pair of frames in Qwen2-VL and its kin.
    Positions: survivors keep theirs. Written from the formula; no engine's code was used.
    Cost: O(V D), and sorts of V numbers.
    """

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = (
        "video tokens that differ from the frame before, first frames whole (EVS, arXiv 2510.14624)"
    )
    site: ClassVar[Site | None] = Site("input")
    reads_frames: ClassVar[bool] = True

    def floor(self, geometry: Geometry) -> int:
        """The tokens of still images and first frames."""
        return geometry.fresh_tokens

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage at `site`.

        Raises:
            BudgetError: if the budget is missing, or below the tokens of first frames and still images.
        """
        site, least = Site("input"), self.floor(geometry)
        try:
            return solve(lambda n: Plan((Stage(site, self, max(n, least)),)), geometry, budget, method=self.name)
        except BudgetError as error:
            if error.floor is None:
                raise
            what = "all of this prompt" if least == geometry.visual_tokens else f"{least} tokens of this prompt"
            raise BudgetError(
                f"{error} It keeps the first frame of every video and every still image whole, {what}; use another "
                "method for images, such as vidcom2.",
                floor=error.floor,
            ) from error

    def score(self, view: TokenView) -> Tensor:
        """[B, V] 1 - cos with the forerunner, in steps of 2**-20; 3 where there is none."""
        return self._score(view, FrameMap.of(view))

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True for what every video keeps at the rate that meets the budget."""
        frames, valid = FrameMap.of(view), view.valid
        score = self._score(view, frames)
        rank = ranks_within(score, frames.film, frames.width, valid)
        size = torch.zeros(len(valid), frames.width, device=valid.device).scatter_add_(1, frames.film, valid.float())
        # the rate at which a token enters its video's share
        rate = (rank + 1) / size.gather(1, frames.film).clamp(min=1.0)
        return top_k_mask((-rate).masked_fill(score == _ALWAYS, 1.0), view.keep, valid)

    def _score(self, view: TokenView, frames: FrameMap) -> Tensor:
        unit = unit_states(view.hidden, view.valid)
        before = frames.before(view.valid)
        cosine = (unit * unit.gather(1, before[..., None].expand_as(unit))).sum(2)
        first = before == torch.arange(before.shape[1], device=before.device)
        return (cosine_distance(cosine) * STEP).masked_fill(first, _ALWAYS)
