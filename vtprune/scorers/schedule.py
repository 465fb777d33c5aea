"""Cuts at several depths: what methods share that leave a paper's shares before a paper's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vtprune.budget import Budget, Geometry, scale_depth, solve
from vtprune.cost import plan_cost
from vtprune.errors import PlanError
from vtprune.plan import Plan, Site, Stage

__all__ = ["check_schedule", "scheduled_layers", "scheduled_plan", "solve_finely"]


def check_schedule(method: str, layers: Sequence[int] | None, ratios: Sequence[float]) -> None:
    """Check knobs that name cuts.

    Args:
        method: whose knobs they are.
        layers: decoder layers before which is cut, or None.
        ratios: share of the visual tokens that each cut leaves.

    Raises:
        PlanError: if they do not rise and fall as they must, or are not as many.
    """
    falling = all(a > b for a, b in zip((1.0, *ratios), ratios, strict=False))
    if not ratios or not falling or ratios[-1] <= 0.0:
        raise PlanError(f"{method} ratios must fall from below 1 to above 0, got {ratios!r}.")
    if layers is not None:
        rising = all(a < b for a, b in zip((0, *layers), layers, strict=False))
        if len(layers) != len(ratios) or not rising:
            raise PlanError(
                f"{method} layers must be {len(ratios)} increasing numbers from 1 on, one a ratio, got {layers!r}."
            )


def scheduled_layers(
    method: str, layers: tuple[int, ...] | None, paper: tuple[int, ...], ratios: Sequence[float], depth: int
) -> tuple[int, ...]:
    """The layers on a decoder of `depth` layers; None moves the paper's, which are of 32.

    Raises:
        PlanError: if they are not layers of this decoder, one a ratio.
    """
    found = layers or scale_depth(paper, 32, depth)
    if len(found) != len(ratios) or found[-1] >= depth or len(set(found)) < len(found):
        raise PlanError(
            f"{method} needs {len(ratios)} layers below {depth} (the decoder's), got {found}. "
            "Set layers and ratios of the same length."
        )
    return found


def solve_finely(
    build: Callable[[float], Plan], geometry: Geometry, budget: Budget, *, method: str, knob: str | None = None
) -> Plan:
    """`vtprune.budget.solve` for schedules whose earlier cuts move faster than their last one.

    From one number behind the last cut to the next, the average over the layers may move by a dozen tokens; a budget
    of average tokens is therefore looked for between two such numbers as well.

    Args:
        build: plan for so many survivors of the last cut, which need not be whole.
        geometry, budget, method, knob: as for `solve`.

    Raises:
        BudgetError: as `solve`.
    """
    solved = solve(build, geometry, budget, method=method, knob=knob)
    value, total = budget.value, geometry.visual_tokens
    if budget.basis != "average" or value is None or budget.is_all(total):
        return solved
    target, last = value * total if isinstance(value, float) else value, solved.stages[-1].count(total)
    finer = [solved, *(build(max(1.0, last + step / 16)) for step in range(-16, 17))]
    return min(finer, key=lambda plan: abs(plan_cost(plan, geometry, "average") - target))


def scheduled_plan(
    method: str,
    layers: Sequence[int],
    ratios: Sequence[float],
    stage: Callable[[Site, int], Stage],
    geometry: Geometry,
    budget: Budget,
) -> Plan:
    """A stage before each layer. Without a budget they leave the ratios of what enters, cut off.

    Another budget keeps the shares that the cuts have in what is dropped: with ratios (1/2, 1/4, 1/8) the first drops
    4/7 of it, the second 2/7 and the third 1/7.

    Raises:
        BudgetError: if the budget is below the floor that the layers set.
    """
    entering = max(geometry.entering)

    def stages(counts: Sequence[int]) -> Plan:
        return Plan(tuple(stage(Site("layer", k), max(1, n)) for k, n in zip(layers, counts, strict=True)))

    if budget.value is None:
        return stages([int(entering * ratio) for ratio in ratios])
    dropped = [(1.0 - ratio) / (1.0 - ratios[-1]) for ratio in ratios]

    def build(last: int) -> Plan:
        return stages([math.floor(entering - (entering - last) * share + 0.5) for share in dropped])

    return solve(build, geometry, budget, method=method, knob="layers")
