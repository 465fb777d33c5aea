"""HiPrune: what a middle block of the tower attends to, what lies around it, and what the last block attends to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, VisionGeometry, scale_depth
from vtprune.contract import METHODS, AttentionView, Memory, Queries, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Site
from vtprune.rules import top_k_mask
from vtprune.scorers.tower_end import TowerEndScorer, received_attention

__all__ = ["HiPrune", "beside"]


@METHODS.register("hiprune")
@dataclass(frozen=True)
class HiPrune(TowerEndScorer):
    """Keeps patches that a middle block of the tower attends to, their neighbours, and what the last block attends to.

    Paper: HiPrune, arXiv 2508.00553. Site: between tower and projector. A patch scores in a block what it receives of
    all queries, CLS among them, mean over heads and queries (the authors' code; no CLS is needed). Of T survivors
    round(alpha T / 5), half to even, are anchors: the best in the object block. Buffers: the patches above, below, left
    and right of an anchor. Registers fill up to T: the best of the others in the block that the projector reads. So few
    tokens that no anchor comes out are all registers. Reads no text.
    The object block is the authors' 9th of 24 in towers with CLS (CLIP in LLaVA) and 16th of 32 in others (Qwen2.5-VL),
    moved to the tower's depth; where blocks attend in windows, the nearest that does not.
    Differs from the code: neighbours are those on the grid, where the code adds 1 and the width to the index, so that
    the last patch of a row and the first of the next are neighbours; where anchors and buffers are more than T, the
    best by the object block stay, where the code fails; counts of crops are in proportion to their patches.
    Positions: survivors keep theirs.
    Cost: the N^2 attention weights of two blocks, made in blocks of rows and not kept.

    Attributes:
        alpha: share of the survivors that are anchors and buffers, in [0, 1]. The authors' 0.1.
        block: the object block, 0-based, at most the one that the projector reads; None as above.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "attention of a middle and the last tower block, and neighbours (arXiv 2508.00553)"
    queries: ClassVar[Queries | None] = "mean"

    alpha: float = 0.1
    block: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0.0 <= self.alpha <= 1.0:
            raise PlanError(f"hiprune alpha must be a number in [0, 1], got {self.alpha!r}. The authors use 0.1.")
        whole = isinstance(self.block, int) and not isinstance(self.block, bool)
        if self.block is not None and (not whole or self.block < 0):
            raise PlanError(f"hiprune block must be a tower block, an int >= 0, or None, got {self.block!r}.")

    def watches(self, site: Site) -> range:
        """The object block and the last one."""
        first = site.index if self.block is None else min(self.block, site.index)
        return range(first, site.index + 1, max(1, site.index - first))

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what patches receive, [B, V]: in the first block that is seen, `object`, and the latest, `deep`."""
        received = received_attention(view, by_all=True)
        return {"object": memory.get("object", received), "deep": received}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] what the last block attends to, fp32."""
        return view.memory["deep"]

    def select(self, view: TokenView) -> Tensor:
        """See `Scorer.select`."""
        middle, keep = view.memory["object"], view.keep.minimum(view.valid.sum(1))
        # in fp64 as Python counts, so that the half goes to even where it does in the code
        number = (keep.double() * self.alpha / 5).round().long()
        anchors = top_k_mask(middle, number, view.valid)
        around = beside(view, anchors) & view.valid & ~anchors
        front = anchors | top_k_mask(middle, keep - anchors.sum(1), around)
        return front | top_k_mask(self.score(view), keep - front.sum(1), view.valid & ~front)

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage between tower and projector, which knows its object block.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            PlanError: if the object block lies behind the one that the projector reads.
            UnsupportedModelError: if the family opens no tower.
        """
        last = self.end_of(geometry).index
        block = _middle(geometry.vision, last) if self.block is None and geometry.vision is not None else self.block
        if block is not None and block > last:
            raise PlanError(f"hiprune block must be in [0, {last}], the block that the projector reads, got {block}.")
        plan = super().plan(geometry, budget)
        return Plan(tuple(dataclasses.replace(s, scorer=dataclasses.replace(self, block=block)) for s in plan.stages))


def _middle(vision: VisionGeometry, last: int) -> int:
    """The default object block."""
    paper = (9, 24) if vision.has_cls else (16, 32)
    at = min(last, scale_depth(paper[:1], paper[1], vision.blocks)[0] - 1) if vision.blocks > 1 else 0
    whole = [k for k in vision.full_blocks or () if k <= last]
    return min(whole, key=lambda k: abs(k - at)) if whole else at


def beside(view: TokenView, marks: Tensor) -> Tensor:
    """[B, V] True at tokens above, below, left or right of a marked one on the grid; marks [B, V] not at padding."""
    sizes = [size for grids in view.grids for size in grids]
    high, wide = (max((size[axis] for size in sizes), default=0) + 2 for axis in (0, 1))
    number = max((len(grids) for grids in view.grids), default=0)
    # a cell of margin around every grid
    cell = ((view.grid * high + view.row + 1) * wide + view.col + 1).masked_fill(~view.valid, 0)
    board = torch.zeros(len(marks), max(1, number * high * wide), dtype=torch.int32, device=marks.device)
    board.scatter_add_(1, cell, (marks & view.valid).int())
    near = torch.zeros_like(cell)
    for step in (-wide, -1, 1, wide):
        near += board.gather(1, (cell + step).clamp(0, board.shape[1] - 1))
    return (near > 0) & view.valid
