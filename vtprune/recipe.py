"""A method with other rules than its own: FlowCut's score, a DPP of it, the rest averaged into the nearest survivor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vtprune.budget import Budget, Geometry
from vtprune.contract import Scorer
from vtprune.errors import PlanError
from vtprune.plan import Plan, Stage
from vtprune.rules import Remainder, Selection

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe(Scorer):
    """A method whose stages carry the selection and the remainder given here; as text `flowcut/dpp/nearest`.

    It goes wherever a method goes, and solves budgets as the method does. Its plan holds stages of the method itself,
    so that nothing of the recipe runs but the rules. All stages of the method get both rules.

    Attributes:
        method: that scores.
        chosen: how a set is made of the scores; None does as the method.
        rest: what happens to tokens that are not in it; None does as the method.

    Raises:
        PlanError: if `method` is a recipe itself.
    """

    method: Scorer
    chosen: Selection | None = None
    rest: Remainder | None = None

    def __post_init__(self) -> None:
        if isinstance(self.method, Recipe):
            raise PlanError(f"{self.method.name} has its rules already: give the method alone, and all rules at once.")
        parts = [self.method, self.chosen, self.rest]
        adaptive = self.chosen is not None and self.chosen.adaptive
        # these differ from recipe to recipe, where a method's are those of its class
        for name, value in (
            ("name", "/".join(part.name for part in parts if part is not None)),
            ("summary", self.method.summary),
            ("adaptive", self.method.adaptive or adaptive),
            ("takes_budget", self.method.takes_budget),
            ("reads_text", self.method.reads_text),
        ):
            object.__setattr__(self, name, value)

    def bind(self, model: Any) -> Recipe:
        """See `Scorer.bind`."""
        return dataclasses.replace(self, method=self.method.bind(model))

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """The method's stages with these rules.

        Without a budget a selection that decides itself may keep as little as one token.

        Raises:
            BudgetError: as the method's own.
            PlanError: if a rule does not fit the method, or the method's own.
        """
        decides = self.chosen is not None and self.chosen.adaptive
        if budget.value is None and decides and not self.method.adaptive:
            budget = Budget(1, "final")
        stages = self.method.plan(geometry, budget).stages
        return Plan(tuple(self._with_rules(stage, decides) for stage in stages))

    def _with_rules(self, stage: Stage, decides: bool) -> Stage:
        return dataclasses.replace(
            stage,
            adaptive=stage.adaptive or decides,
            selection=stage.selection if self.chosen is None else self.chosen,
            remainder=stage.remainder if self.rest is None else self.rest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Refuses: what is saved is a plan.

        Raises:
            PlanError: always.
        """
        raise PlanError(f"{self.name} is a recipe, which has no form of its own: save its plan, or write it as text.")
