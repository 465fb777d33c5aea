"""Recorded sets: the same tokens again, whatever chose them the first time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.report import Kept

__all__ = ["Replay", "replay"]


def replay(plan: Plan, kept: Sequence[Kept | Mapping[str, Any]]) -> Plan:
    """A plan that keeps recorded tokens: the sites and positions of `plan`, with the sets of one call of it.

    It fits the very batch that was recorded (or one of the same prompts, in the same order), on any model whose visual
    tokens lie the same way: to ask whether a result comes from the choice or from the numerics, to carry one model's
    choice to another, to compare attention backends on equal sets. What a stage only ran to choose is not run again.

    Args:
        plan: that was recorded.
        kept: `session.report.kept`, or the same as dicts with `site` and `indices`; one record a stage.

    Raises:
        PlanError: if the records are not those of the plan's stages, or a stage cannot be replayed: one that merges
            tokens, or that drops text.
    """
    if len(kept) != len(plan.stages):
        raise PlanError(f"the plan has {len(plan.stages)} stages, but {len(kept)} are recorded. Pass both of one call.")
    return Plan(tuple(_stage(stage, record) for stage, record in zip(plan.stages, kept, strict=True)))


def _stage(stage: Stage, record: Kept | Mapping[str, Any]) -> Stage:
    given = record if isinstance(record, Mapping) else vars(record)
    if str(given["site"]) != str(stage.site):
        raise PlanError(f"a set recorded at {given['site']} does not belong to the plan's stage at {stage.site}.")
    if stage.merges:
        rule = stage.rules[1]
        name = stage.scorer.name if rule is None else f"{stage.scorer.name}/{rule.name}"
        raise PlanError(f"{name} merges tokens at {stage.site}, and a replay can only keep and drop; no replay.")
    if given.get("text") is not None or stage.scorer.drops_text:
        raise PlanError(f"{stage.scorer.name} also drops text at {stage.site}; only visual tokens can be replayed.")
    scorer = Replay(tuple(tuple(int(n) for n in sample) for sample in given["indices"]))
    if stage.site.kind == "vision":
        # a tower cuts every image to the count that the stage names
        return replace(stage, scorer=scorer, selection=None, remainder=None)
    # nothing is asked, so survivors of a restart go in from the start
    site = Site("input") if stage.site.kind == "restart" else stage.site
    keep = 0 if site.kind == "layer" else 1
    return replace(stage, site=site, scorer=scorer, keep=keep, adaptive=True, selection=None, remainder=None)


@METHODS.register("replay", listed=False)
@dataclass(frozen=True)
class Replay(Scorer):
    """Keeps the recorded tokens of each sample; made by `replay`.

    Attributes:
        kept: for each sample of the batch the indices of its visual tokens that survive. With beam search, where the
            batch has several rows a sample, each set serves them all.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "the tokens that another call kept"
    adaptive: ClassVar[bool] = True

    kept: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(tuple(sample) for sample in self.kept))

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """Refuses: the sites are in the plan that was recorded."""
        raise PlanError("recorded sets belong to the sites of a plan: use vtprune.replay(plan, report.kept).")

    def count(self, view: TokenView) -> Tensor:
        """[B] how many were recorded."""
        return self.select(view).sum(1)

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True at the recorded tokens.

        Raises:
            PlanError: if the batch is not the recorded one.
        """
        batch = view.valid.shape[0]
        if not self.kept or batch % len(self.kept):
            raise PlanError(
                f"sets of {len(self.kept)} samples were recorded, but {view.site} sees {batch}"
                f"{' images or crops' if view.site.kind == 'vision' else ''}. Replay the batch that was recorded"
                f"{', with one image a prompt' if view.site.kind == 'vision' else ''}."
            )
        chosen = torch.zeros_like(view.valid)
        for row in range(batch):
            wanted = self.kept[row // (batch // len(self.kept))]
            chosen[row] = torch.isin(view.original[row], torch.tensor(wanted, dtype=torch.long).to(chosen.device))
            alive = chosen[row] & view.valid[row]
            found = int(alive.sum())
            if found != len(wanted):
                raise PlanError(
                    f"{len(wanted)} tokens of sample {row} were recorded at {view.site}, but only {found} of them are "
                    "there. Replay the prompts that were recorded, on a model with the same visual tokens."
                )
        return chosen & view.valid
