"""From what the user asked for to the plan of each sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vtprune.budget import Budget, Geometry
from vtprune.contract import Scorer, compose
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Plan, Stage
from vtprune.specs import parse_chain, parse_method

__all__ = ["Methods", "Planner"]

Methods = str | Scorer | Plan | Sequence[str | Scorer]


class Planner:
    """Solves the budget for each prompt size that occurs, once.

    Attributes:
        geometry: the model with a prompt of one image.
        nominal: the plan for that prompt; other prompts get plans with the same sites and other counts.
    """

    def __init__(
        self,
        geometry: Geometry,
        methods: Methods,
        keep: Any,
        basis: str,
        flops: float | None,
        bind: Callable[[Scorer], Scorer] = lambda method: method,
    ) -> None:
        self.geometry = geometry
        if isinstance(methods, str):
            chain = parse_chain(methods)
            methods, keep = chain.plan or chain.methods, chain.keeps(keep)
        self._fixed = None
        if isinstance(methods, Plan):
            self._fixed = Plan(tuple(dataclasses.replace(s, scorer=bind(s.scorer)) for s in methods.stages))
        self._methods: list[Scorer] = []
        self._budgets: list[Budget] = []
        if self._fixed is not None:
            if keep is not None or flops is not None:
                raise BudgetError(f"a Plan carries its own counts; leave out keep={keep!r} and flops={flops!r}.")
            self.nominal = self._fixed
        else:
            self._methods = [bind(_method(m)) for m in _as_list(methods)]
            self._budgets = _budgets(self._methods, keep, basis, flops)
            self.nominal = self._nominal()
        self._solved: dict[tuple[int, int, int, int | None], Plan] = {}
        self._towers: dict[int, tuple[Stage, ...]] = {}

    @property
    def inactive(self) -> bool:
        """True if every token is kept whatever the prompt."""
        if self._fixed is None:
            return all(isinstance(b.value, float) and b.value == 1.0 for b in self._budgets)
        return all(isinstance(s.keep, float) and s.keep == 1.0 for s in self._fixed.stages)

    @property
    def needs_text(self) -> bool:
        """True if plans depend on the number of text tokens."""
        return any(b.basis == "flops" for b in self._budgets)

    def plan_for(self, visual_tokens: int, text_tokens: int, images: int, opening: int | None = None) -> Plan:
        """The plan of one sample; `opening` as in `Geometry`.

        Raises:
            BudgetError: if the budget does not fit this prompt.
        """
        if visual_tokens == 0:
            return self.nominal
        if self._fixed is not None:
            _check_floors(self._fixed, self.geometry.for_prompt(visual_tokens, text_tokens, images, opening=opening))
            return self.nominal
        if not self.needs_text:
            text_tokens = 0
        key = (visual_tokens, text_tokens, images, opening)
        if key not in self._solved:
            plan = self._solve(self.geometry.for_prompt(*key[:3], opening=opening))
            tower = self.tower(visual_tokens)
            self._solved[key] = Plan(tower + plan.stages[len(tower) :]) if tower else plan
        return self._solved[key]

    def tower(self, visual_tokens: int) -> tuple[Stage, ...]:
        """The tower's stages for an image (or video) of so many tokens, which is encoded before its prompt is known.

        Raises:
            BudgetError: if the budget does not fit this image.
        """
        nominal, shape = self.nominal.at("vision"), self.geometry
        if not nominal or self._fixed is not None or not shape.dynamic:
            return nominal
        if visual_tokens not in self._towers:
            # what a later method needs of the frames is known once the prompt is
            plan = self._solve(shape.for_prompt(visual_tokens, shape.text_tokens, 1, opening=0))
            self._towers[visual_tokens] = plan.at("vision")
        return self._towers[visual_tokens]

    def _nominal(self) -> Plan:
        try:
            return self._solve(self.geometry)
        except BudgetError:
            # what one example image cannot reach may fit the prompt that comes
            if self.geometry.dynamic:
                return compose(self._methods, [Budget(1.0)] * len(self._methods), self.geometry)
            # a share of FLOPs that a prompt with much text cannot reach may fit one with little
            if not self.needs_text:
                raise
            shape = self.geometry
            plan = self._solve(shape.for_prompt(shape.visual_tokens, 0, shape.images))
            if plan.at("vision"):
                raise
            return plan

    def _solve(self, geometry: Geometry) -> Plan:
        try:
            return compose(self._methods, self._budgets, geometry)
        except BudgetError as error:
            if len(self._methods) == 1:
                raise
            chain = "+".join(f"{m.name}{_behind(b)}" for m, b in zip(self._methods, self._budgets, strict=True))
            raise BudgetError(f"in the chain {chain}: {error}", floor=error.floor) from error


def _check_floors(plan: Plan, geometry: Geometry) -> None:
    """Refuse counts below what a stage's method needs, where nobody solved for them."""
    total = geometry.visual_tokens
    for stage in plan.stages:
        least, kept = min(total, stage.scorer.floor(geometry)), stage.count(total)
        if kept < least:
            raise BudgetError(
                f"the plan keeps {kept} of {total} visual tokens at {stage.site}, but {stage.scorer.name} needs at "
                f"least {least} of this prompt. Raise the stage's keep={stage.keep!r}.",
                floor=least,
            )


def _behind(budget: Budget) -> str:
    """A budget as a chain spells it, nothing if the method decides itself."""
    if budget.value is None:
        return ""
    return f"@{budget.value:.4g}" if isinstance(budget.value, float) else f"@{budget.value}"


def _as_list(methods: Any) -> list[str | Scorer]:
    if isinstance(methods, (str, Scorer)):
        return [methods]
    if not isinstance(methods, Sequence) or not methods:
        raise PlanError(f"method must be a name, a method object, a list of them or a Plan, got {methods!r}.")
    return list(methods)


def _method(method: Any) -> Scorer:
    if isinstance(method, str):
        return parse_method(method)
    if isinstance(method, Scorer):
        return method
    raise PlanError(f"method must be a name, a method object, a list of them or a Plan, got {method!r}.")


def _budgets(methods: list[Scorer], keep: Any, basis: str, flops: float | None) -> list[Budget]:
    if isinstance(keep, (list, tuple)):
        if len(keep) != len(methods):
            raise BudgetError(f"give one keep a method: got {len(keep)} ({list(keep)}) for {len(methods)} method(s).")
        keeps = list(keep)
    elif len(methods) > 1 and keep is not None and keep != 1.0:
        raise BudgetError(
            f"{len(methods)} methods need a list of budgets in the same order, such as keep=[288, 64] (or, as text, "
            f"'flowcut@288+fastv' with keep=64), got keep={keep!r}."
        )
    else:
        keeps = [keep] * len(methods)
    budgets = [Budget.make(k, basis=basis, flops=flops) for k in keeps]
    for method, budget in zip(methods, budgets, strict=True):
        if budget.value is None and not method.adaptive:
            method.require(budget)
    return budgets
