"""One cut decided: scores, the set that is made of them, and who stands for the rest.

Axes: B samples, V visual tokens alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vtprune.contract import Scorer
from vtprune.errors import PlanError
from vtprune.plan import Stage
from vtprune.rules import Merge, Selection, top_k_mask
from vtprune.views import TokenView

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """What a stage decided.

    Attributes:
        kept: [B, V] bool, the tokens that stay.
        counts: how many of each sample.
        merge: who stands for whom; None if the rest is dropped.
        scores: [B, V] what the scorer returned, None if it gives none.
    """

    kept: Tensor
    counts: list[int]
    merge: Merge | None
    scores: Tensor | None


def choose(stage: Stage, view: TokenView, keep: Sequence[int]) -> Choice:
    """Decide a cut: score, select, and give the rest away. The stage's own rules go before the scorer's.

    Args:
        stage: that cuts.
        view: what it cuts.
        keep: survivors asked of each sample, `view.keep` on the host (the fewest, if the stage is adaptive).

    Raises:
        PlanError: if a rule keeps another number of tokens than asked.
    """
    scorer, (selection, remainder), counts = stage.scorer, stage.rules, list(keep)
    scores = scorer.score(view) if scorer.has_score else None
    if stage.adaptive:
        decided = scorer.count(view) if selection is None or not selection.adaptive else selection.count(view, scores)
        decided = decided.to(view.keep).maximum(view.keep).minimum(view.valid.sum(1))
        view, counts = dataclasses.replace(view, keep=decided), decided.tolist()
    kept, merge = _divide(stage, view, scores)
    # the best by score are as many as asked by construction; every other rule is checked
    if selection is not None or merge is not None or not scorer.selects_best:
        found = (kept & view.valid).sum(1).tolist()
        if found != counts:
            by = f"{scorer.name}.select()" if selection is None else f"selection {selection.name} on {scorer.name}"
            by = by if remainder is None else f"{by} with remainder {remainder.name}"
            raise PlanError(f"{by} kept {found} tokens a sample at {stage.site}, but {counts} were asked.")
    return Choice(kept, counts, merge, scores)


def _divide(stage: Stage, view: TokenView, scores: Tensor | None) -> tuple[Tensor, Merge | None]:
    """The set, and who stands for the rest; None if the rest is dropped."""
    scorer, (selection, remainder) = stage.scorer, stage.rules
    if selection is None and remainder is None and scorer.merges:
        merge = scorer.merge(view)
        return merge.kept, merge
    fewer = view if remainder is None else dataclasses.replace(view, keep=view.keep - remainder.places(view))
    kept = _select(scorer, selection, fewer, scores)
    if not stage.merges:
        return kept, None
    merge = Merge(kept, scorer.assign(view, kept)) if remainder is None else remainder.merge(view, kept, scores)
    return merge.kept, merge


def _select(scorer: Scorer, selection: Selection | None, view: TokenView, scores: Tensor | None) -> Tensor:
    if selection is not None:
        return selection.select(view, scores)
    if scores is not None and scorer.selects_best:
        return top_k_mask(scores, view.keep, view.valid)
    return scorer.select(view)
