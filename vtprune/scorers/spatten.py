"""SpAtten: what has received little attention so far leaves, layer by layer, and never comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.scorers.schedule import solve_finely
from vtprune.scorers.tower_end import summed_attention

__all__ = ["SpAtten"]


@METHODS.register("spatten")
@dataclass(frozen=True)
class SpAtten(Scorer):
    """Cuts before every decoder layer but the first few, and keeps what has received most attention so far.

    Paper: SpAtten, arXiv 2012.09852, cascade token pruning. The importance of token j adds up over heads, queries and
    layers: s_j += sum_h sum_i P_h[i, j], P the softmax of a layer over all keys that query i sees, text among the
    queries and keys. Before the next layer the least important leave, and stay away in all later layers and while
    decoding. Site: `layer[k]` for every k from `untouched` L on; the number that stays falls in a straight line.
    With m the mean share that stays over those layers, the line runs from m + d to m - d, d = `spread` times the
    smaller of m and 1 - m. The paper has such a line with two ends to choose, and says neither.
    Differs from the paper: text never leaves (it competes with the picture there), nothing leaves while decoding, and
    heads and values are not pruned. The code that was released does something else (it evicts keys of a chat by the
    logits of the last call, head by head); this is the paper's rule.
    Early rows are seen by more queries than late ones, so that under a causal mask the sum favours the front of the
    picture; the paper does not correct that, and neither does this.
    Positions: survivors keep theirs unless told otherwise. The first layers see all V tokens, so that the average over
    L layers cannot fall below `untouched` V.
    Cost: the attention weights of every watched layer once more, O(H N^2 d), in blocks of rows: more than other
    methods take, and above 2 % of a prefill.

    Attributes:
        untouched: share of the layers, the first ones, in front of which nothing leaves, in (0, 1). The paper's 0.15.
        spread: how much steeper than level the line is, in [0, 1). Chosen here.
        positions: "keep", or "compact", which renumbers the sequence after each cut.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "spatten"
    summary: ClassVar[str] = "attention received so far, a little less stays in every layer (arXiv 2012.09852)"
    queries: ClassVar[Queries | None] = "all"
    accumulates: ClassVar[bool] = True

    untouched: float = 0.15
    spread: float = 0.5
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        for name, value, least in (("untouched", self.untouched, False), ("spread", self.spread, True)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0.0 < value < 1.0 or (least and value == 0.0)):
                raise PlanError(f"spatten {name} must be a number in {'[' if least else '('}0, 1), got {value!r}.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"spatten positions must be 'keep' or 'compact', got {self.positions!r}.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Add what each visual token receives in this layer, `importance` [B, V]."""
        received = summed_attention(view, view.query, view.rows)
        return {"importance": received + memory.get("importance", torch.zeros_like(received))}

    def score(self, view: TokenView) -> torch.Tensor:
        """[B, V] attention received in all layers so far, fp32, mean over heads and summed over queries."""
        return view.memory["importance"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage before each layer from `untouched` L on where fewer stay than before.

        Raises:
            BudgetError: if the budget is missing or below the floor that the untouched layers set.
            PlanError: if they leave no layer to cut before.
        """
        first = max(1, math.ceil(self.untouched * geometry.layers))
        if first >= geometry.layers:
            raise PlanError(
                f"spatten untouched={self.untouched} leaves no layer to cut before in a decoder of {geometry.layers} "
                "layers. Lower it."
            )
        entering, steps = max(geometry.entering), geometry.layers - first

        def build(last: float) -> Plan:
            high, low = self._ends(last / max(1, entering))
            stages, now = [], entering
            for step in range(steps):
                share = high + (low - high) * step / max(1, steps - 1)
                count = min(now, max(1, math.floor(entering * share + 0.5)))
                if count < now or not stages:
                    stages.append(Stage(Site("layer", first + step), self, count, positions=self.positions))
                now = count
            return Plan(tuple(stages))

        return solve_finely(build, geometry, budget, method=self.name, knob="untouched")

    def _ends(self, last: float) -> tuple[float, float]:
        """Shares at both ends of the line whose lower end is `last`."""
        if last <= (1.0 - self.spread) / 2.0:
            return last * (1.0 + self.spread) / (1.0 - self.spread), last
        mean = (last + self.spread) / (1.0 + self.spread)
        return 2.0 * mean - last, last
