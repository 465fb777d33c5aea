"""What a plan will cost on the questions at hand, counted, and budgets that land just below (or above) a share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from vtprune.budget import Budget, Geometry
from vtprune.contract import Scorer
from vtprune.cost import plan_cost, prefill_flops
from vtprune.errors import BudgetError
from vtprune.plan import Plan

__all__ = ["Costs", "behind", "portable", "solve_chain"]

_NOTHING = Plan()


class Costs:
    """Counts the decoder prefill of plans on batches of known sizes.

    Attributes:
        geometry: the model with the most frequent number of visual tokens; plans are solved on it.
    """

    def __init__(self, geometry: Geometry, batches: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Take the (text, visual) tokens of each sample of each batch, padding left out."""
        sizes = Counter(visual for batch in batches for _, visual in batch)
        texts = Counter(text for batch in batches for text, _ in batch)
        self.geometry = geometry.for_prompt(sizes.most_common(1)[0][0], texts.most_common(1)[0][0], 1)
        # of the samples with as many visual tokens the longest sets the width of the batch
        kinds: Counter[tuple[tuple[int, int], ...]] = Counter()
        for batch in batches:
            kinds[tuple((max(t for t, v in batch if v == visual), visual) for visual in {v for _, v in batch})] += len(
                batch
            )
        self._batches = kinds
        self._prompts = {size: geometry.for_prompt(size[1], size[0], 1) for batch in kinds for size in batch}
        self._full = {size: prefill_flops(geometry, [sum(size)] * geometry.layers) for size in self._prompts}

    def share(self, plan: Plan) -> float:
        """FLOPs of the decoder prefill against unpruned; a stage that decides for itself counts at its target."""
        spent = {size: plan_cost(plan, prompt, "flops") * self._full[size] for size, prompt in self._prompts.items()}
        full = sum(n * max(self._full[size] for size in batch) for batch, n in self._batches.items())
        return sum(n * max(spent[size] for size in batch) for batch, n in self._batches.items()) / full

    def most(self, build: Callable[[int], Plan], share: float) -> int:
        """The largest n in 1..V for which `build(n)` costs at most `share`; 0 if none does."""
        low, high = 0, self.geometry.visual_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.share(build(middle)) <= share else (low, middle - 1)
        return low

    def least(self, build: Callable[[int], Plan], share: float) -> int:
        """The smallest n in 1..V for which `build(n)` costs no less than `share`; V if none does."""
        total = self.geometry.visual_tokens
        below = self.most(build, share)
        return below if below and self.share(build(below)) == share else min(total, below + 1)


def portable(plan: Plan, total: int) -> Plan:
    """The plan with shares of `total` tokens for counts, so that it fits images of any size."""
    stages = [
        dataclasses.replace(stage, keep=stage.keep / total) if isinstance(stage.keep, int) and stage.keep else stage
        for stage in plan.stages
    ]
    return Plan(tuple(stages))


def behind(costs: Costs, method: Scorer, before: Plan = _NOTHING) -> Callable[[int], Plan]:
    """A function of n: `before`, then `method` so that n tokens are left at the end (its own decision if it must)."""
    geometry = costs.geometry.after(before)

    def build(n: int) -> Plan:
        budget = Budget(n, "final") if method.takes_budget else Budget(None)
        return before + portable(method.plan(geometry, budget), geometry.visual_tokens)

    return build


def solve_chain(costs: Costs, methods: Sequence[Scorer], split: float, share: float) -> Plan:
    """The plan of one method, or of two in order, that spends as much of `share` as it can.

    Args:
        costs: of the questions at hand.
        methods: one or two.
        split: of two, in [0, 1]: 0 leaves the whole cut to the first method, 1 as much of it as can be to the second.
        share: of the unpruned decoder prefill.

    Raises:
        BudgetError: if even the smallest budget costs more.
        PlanError: if the methods cannot follow each other.
    """
    first, *rest = methods
    if not rest:
        build = behind(costs, first)
        n = costs.most(build, share) if first.takes_budget else 1
        return build(_reached(n, costs, build, first.name, share))
    (second,) = rest
    name = f"{first.name}+{second.name}"

    def with_least(n: int) -> Plan:
        return behind(costs, second, behind(costs, first)(n))(1)

    widest = _reached(costs.most(with_least, share), costs, with_least, name, share)
    if not second.takes_budget:
        return with_least(widest)
    alone = min(widest, max(1, costs.most(behind(costs, first), share)))
    build = behind(costs, second, behind(costs, first)(alone + round(split * (widest - alone))))
    return build(_reached(costs.most(build, share), costs, build, name, share))


def _reached(n: int, costs: Costs, build: Callable[[int], Plan], name: str, share: float) -> int:
    if n:
        return n
    floor = costs.share(build(1))
    raise BudgetError(f"{name} costs at least {100 * floor:.1f} % of the prefill FLOPs, more than {100 * share:.1f} %.")
