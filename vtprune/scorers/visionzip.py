"""VisionZip: dominant patches by CLS attention, and contextual ones that sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS, AttentionView, Memory
from vtprune.remainders.contextual import Contextual
from vtprune.scorers.tower_end import TowerEndScorer, received_attention

__all__ = ["VisionZip"]


@METHODS.register("visionzip")
@dataclass(frozen=True)
class VisionZip(TowerEndScorer):
    """Keeps the patches that CLS attends to most, and merges the others into a few; before the projector.

    Paper: VisionZip, arXiv 2412.04467. Dominant tokens: the best by the attention of CLS in the block whose output the
    projector reads, mean over heads (in towers without CLS what a patch receives from all, as the paper has it).
    Contextual tokens: `contextual` of the budget are evenly spaced among the others and take in those whose keys (mean
    over heads, same block) are most like theirs (`vtprune.remainders.contextual`): target plus mean of its members, as
    in the authors' code. Reads no text.
    Differs from the code: its dominant tokens include CLS itself, for which HF's LLaVA has no place in the prompt, so
    one more patch stays; tokens keep their order and positions, where the code puts contextual ones last and closes
    the gaps up.
    Cost: one attention row, and V x C cosines of keys for C contextual tokens.

    Attributes:
        contextual: share of the survivors that are contextual, in [0, 1). The paper's 10 of 64.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "CLS attention, and the rest merged into contextual tokens (arXiv 2412.04467)"

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        _ = self.remainder

    @property
    def remainder(self) -> Contextual:
        """What becomes of tokens that are not dominant."""
        return Contextual(self.contextual)

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what CLS attends to, `attention` [B, V], and the keys, mean over heads, `metric` [B, V, d]."""
        metric = view.visual(view.key).float().mean(1)
        return {"attention": received_attention(view), "metric": metric.masked_fill(~view.valid[..., None], 0.0)}
