"""PyramidDrop: what the last prompt token attends to, asked again at a few depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.plan import Plan, Positions, Stage
from vtprune.scorers.schedule import check_schedule, scheduled_layers, scheduled_plan

__all__ = ["PyramidDrop"]


@METHODS.register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Scorer):
    """Cuts before a few decoder layers, each time to a share of the visual tokens, by what the question attends to.

    Paper: PyramidDrop, arXiv 2410.17247. Before each of `layers` that layer is asked what the last token of the prompt
    would attend to: score_j = mean over heads of softmax(q_last K^T / sqrt(d))_j over all keys, from the layer's own
    input norm and projections on the states before the cut.
    The paper cuts before layers 8, 16 and 24 of 32 to 1/2, 1/4 and 1/8: without a budget this does so too, at the same
    relative depths. Another budget keeps the shares that the cuts have in what is dropped. The layers before the first
    cut see all tokens, so the average cannot fall below a quarter of them at the paper's depths: put it behind a method
    that cuts earlier, or set `layers`.
    Differs from the paper: survivors keep their positions unless told otherwise, so that the run equals the unpruned
    model with the same tokens hidden, and works under M-RoPE and sliding windows alike.
    Cost: at each cut the queries, keys and values of one layer, which are computed again when that layer runs (counted
    in the report).

    Attributes:
        layers: decoder layers before which is cut, increasing; None moves the paper's (8, 16, 24) of 32 to the model.
        ratios: share of the visual tokens that each cut leaves at the paper's budget.
        positions: "keep", or "compact" (the paper's: the sequence is renumbered after each cut).

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "last prompt token's attention, at three depths (arXiv 2410.17247)"
    queries: ClassVar[Queries | None] = "last"
    adaptive: ClassVar[bool] = True
    ahead: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"pyramiddrop positions must be 'keep' or 'compact', got {self.positions!r}.")
        check_schedule(self.name, self.layers, self.ratios)

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """What the last prompt token would attend to, `attention` [B, V]."""
        rows = attention_rows(
            view.query, view.key, view.scaling, softcap=view.softcap, real=view.real, column=view.column
        )
        return {"attention": rows[:, 0]}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention weight, fp32, in [0, 1]."""
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage before each of `layers`.

        Raises:
            BudgetError: if the budget is below the floor that the layers set.
            PlanError: if a layer is not one of the model.
        """
        layers = scheduled_layers(self.name, self.layers, (8, 16, 24), self.ratios, geometry.layers)
        return scheduled_plan(
            self.name,
            layers,
            self.ratios,
            lambda site, n: Stage(site, self, n, positions=self.positions),
            geometry,
            budget,
        )
