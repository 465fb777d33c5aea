"""Accuracy against cost as a curve: the area below it, and which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["pareto_front", "trapezoid_weights"]


def trapezoid_weights(costs: Sequence[float], low: float, high: float) -> np.ndarray:
    """[K] weights w: `w @ accuracies` is the mean height of the line through K points between `low` and `high`.

    The line joins the points in order of cost; between two of them it is straight, so that the mean height is the
    trapezoid rule with the ends cut off at `low` and `high`. Points of equal cost count as one, at their mean. The
    weights do not depend on the accuracies: one matrix product gives the area of every bootstrap draw.

    Args:
        costs: K costs, in any order.
        low, high: the part of the axis to average over.

    Raises:
        ValueError: if the points do not span `low` to `high`, or that is no interval.
    """
    grid, place, count = np.unique(np.asarray(costs, float), return_inverse=True, return_counts=True)
    if not (len(grid) and grid[0] <= low < high <= grid[-1]):
        raise ValueError(f"costs must span {low:.4g} to {high:.4g}, an interval, got {grid.tolist()}.")
    knots = np.unique(np.concatenate([[low, high], grid[(grid > low) & (grid < high)]]))
    gaps = np.diff(knots)
    heights = (np.concatenate([gaps, [0.0]]) + np.concatenate([[0.0], gaps])) / 2
    # [knots, grid]: how much each point of the grid contributes to the line's height at a knot
    share = np.stack([np.interp(knots, grid, unit) for unit in np.eye(len(grid))], axis=1)
    return ((heights @ share) / count)[place] / (high - low)


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """[K] bool: no other point has at least this value for at most this cost and is better in one of the two.

    Points that agree in both are on the front together.

    Raises:
        ValueError: if there is not one value a cost.
    """
    if len(costs) != len(values):
        raise ValueError(f"need one value a cost, got {len(costs)} costs and {len(values)} values.")
    cost, value = np.asarray(costs, float), np.asarray(values, float)
    no_worse = (cost[:, None] <= cost) & (value[:, None] >= value)
    better = (cost[:, None] < cost) | (value[:, None] > value)
    return np.logical_not(np.any(no_worse & better, axis=0))
