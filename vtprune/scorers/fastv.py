"""FastV: what the last prompt token attends to in an early decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry, decoder_layer, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.plan import Plan, Positions, Site, Stage

__all__ = ["FastV"]


@METHODS.register("fastv")
@dataclass(frozen=True)
class FastV(Scorer):
    """Cuts once, before decoder layer K, and keeps the tokens that the last prompt token attends to most in layer K-1.

    Paper: FastV, arXiv 2403.06764. score_j = mean over heads of softmax(q_last K^T / sqrt(d))_j, the softmax taken over
    all keys, text included. Survivors keep their order and their position ids.
    Paper and code differ: the paper averages the attention over all queries, its code reads the last token only; this
    follows the code. The row is computed apart, in fp32, so any attention backend will do and no layer runs twice.
    Layers below K see all V tokens, so the average over L layers cannot fall below (K V + L - K) / L.
    Cost: H x N x d multiply-adds for a single row.

    Attributes:
        layer: K, in [1, L); None moves the paper's 2 of 32 layers to the depth of the model.
        positions: "keep" (the paper's) or "compact", which renumbers the sequence after the cut.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "last prompt token's attention in an early decoder layer (arXiv 2403.06764)"
    queries: ClassVar[Queries | None] = "last"

    layer: int | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        layer = self.layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise PlanError(f"fastv layer must be an int >= 1 or None, got {layer!r}. The paper cuts before layer 2.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"fastv positions must be 'keep' or 'compact', got {self.positions!r}.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember the attention of the last prompt token, [B, V]."""
        rows = attention_rows(
            view.query, view.key, view.scaling, softcap=view.softcap, real=view.real, column=view.column
        )
        return {"attention": rows[:, 0]}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention weight, fp32, in [0, 1]."""
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage before layer K.

        Raises:
            BudgetError: if the budget is missing or below the floor that K sets.
            PlanError: if K is not a layer of the model.
        """
        site = Site("layer", decoder_layer(self.name, self.layer, (2, 32), geometry.layers))
        return solve(
            lambda n: Plan((Stage(site, self, n, positions=self.positions),)),
            geometry,
            budget,
            method=self.name,
            knob="layer",
        )
