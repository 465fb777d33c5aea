"""Important tokens by score, diverse ones by pairing the rest off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import SELECTIONS, Selection, require_scores, top_k_mask
from vtprune.similarity import cosine_distance, unit_states
from vtprune.views import TokenView

__all__ = ["Pairs"]

# cosines of all pairs that are kept, 64 MiB; the rounds ask for most of them again and again
_MOST = 1 << 24


@SELECTIONS.register("pairs")
@dataclass(frozen=True)
class Pairs(Selection):
    """VisPruner's set (arXiv 2412.01818): floor(important T) of the T survivors by score, the others by redundancy.

    Of the tokens that are not important, in order, those at even places are compared with those at odd places; the up
    to `at_once` even ones most like an odd one (highest cosine) leave, and so on with what is left until the count is
    reached. Of equally redundant ones the later leaves. Cosines are compared in steps of 2**-20.
    What is left stays in order after each round (the paper does not say which order it has).
    Cost: O(V^2 D) once for the cosines of all pairs; where those are too many to keep (above about 4000 tokens),
    O(R^2 D / 4) for each of (R - T) / at_once rounds, R tokens in it.

    Attributes:
        important: share of the survivors that the score chooses, in [0, 1]. The paper's 0.5.
        at_once: most tokens that leave in a round, >= 1. The authors' 8.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "pairs"
    summary: ClassVar[str] = "half by score, half by removing look-alikes (arXiv 2412.01818)"

    important: float = 0.5
    at_once: int = 8

    def __post_init__(self) -> None:
        number = isinstance(self.important, (int, float)) and not isinstance(self.important, bool)
        if not number or not 0.0 <= self.important <= 1.0:
            raise PlanError(f"pairs important must be a number in [0, 1], got {self.important!r}. The paper uses 0.5.")
        if isinstance(self.at_once, bool) or not isinstance(self.at_once, int) or self.at_once < 1:
            raise PlanError(f"pairs at_once must be an int >= 1, got {self.at_once!r}. The authors use 8.")

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return self.important > 0.0

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        valid, device = view.valid, view.valid.device
        alive = valid.sum(1).tolist()
        wanted = [min(k, n) for k, n in zip(view.keep.tolist(), alive, strict=True)]
        if wanted == alive:
            return valid.clone()
        first = [int(self.important * k) for k in wanted]
        kept = torch.zeros_like(valid)
        if any(first):
            kept = top_k_mask(require_scores(scores, self.name), torch.tensor(first, device=device), valid)
        states = unit_states(view.hidden, valid)
        left = [n - f for n, f in zip(alive, first, strict=True)]
        goal = [k - f for k, f in zip(wanted, first, strict=True)]
        index = _front(valid & ~kept)[:, : max(left)]
        distances = _all_distances(states)
        while left != goal:
            leave = [min(self.at_once, n - g, -(-n // 2)) for n, g in zip(left, goal, strict=True)]
            there = torch.arange(index.shape[1], device=device) < torch.tensor(left, device=device)[:, None]
            stays = self._round(states, distances, index, there, leave)
            left = [n - r for n, r in zip(left, leave, strict=True)]
            index = index.gather(1, _front(stays)[:, : max(left)])
        there = torch.arange(index.shape[1], device=device) < torch.tensor(left, device=device)[:, None]
        return kept | torch.zeros_like(kept).long().scatter_add_(1, index, there.long()).bool()

    def _round(
        self, states: Tensor, distances: Tensor | None, index: Tensor, there: Tensor, leave: list[int]
    ) -> Tensor:
        """[B, R] of the tokens at `index` those that stay."""
        even, odd = index[:, ::2], index[:, 1::2]
        mine, others = there[:, ::2], there[:, 1::2]
        if odd.shape[1]:
            apart = _distances(states, distances, even, odd)
            distance = apart.masked_fill(~others[:, None], float("inf")).amin(2)
        else:
            distance = torch.zeros(mine.shape, device=mine.device)
        count = mine.sum(1) - torch.tensor(leave, device=mine.device)
        stays = there.clone()
        stays[:, ::2] = top_k_mask(distance, count, mine)
        return stays


def _all_distances(states: Tensor) -> Tensor | None:
    """[B, V, V] distances of all pairs, None where there are too many."""
    batch, length, _ = states.shape
    if batch * length**2 > _MOST:
        return None
    return cosine_distance(states @ states.transpose(1, 2))


def _distances(states: Tensor, known: Tensor | None, ones: Tensor, others: Tensor) -> Tensor:
    """[B, R, S] between the tokens at `ones` [B, R] and those at `others` [B, S]."""
    if known is not None:
        sample = torch.arange(len(known), device=known.device)[:, None, None]
        return known[sample, ones[:, :, None], others[:, None]]
    width = states.shape[2]
    first, second = (states.gather(1, index[..., None].expand(-1, -1, width)) for index in (ones, others))
    return cosine_distance(first @ second.transpose(1, 2))


def _front(marks: Tensor) -> Tensor:
    """[B, V] indices, those of marked tokens first, in order."""
    return torch.argsort((~marks).to(torch.uint8), dim=1, stable=True)
