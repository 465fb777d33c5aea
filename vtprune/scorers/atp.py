"""ATP-LLaVA: thresholds that are learned for each prompt say which tokens are redundant and how fine a grid stays."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, scale_depth, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.predictors import Thresholds
from vtprune.scorers.instruction import instruction_attention
from vtprune.scorers.learned import LearnedScorer

__all__ = ["ATP", "module_layers", "self_attention", "spatial_score"]

_EPSILON = 1e-8


def self_attention(view: AttentionView, *, axis: Literal["received", "given"] = "received") -> Tensor:
    """[B, V] mean logit between each visual token and all visual tokens, over the heads too, before any mask.

    S_self(j) = mean_i mean_h q_i . k_j scaling (equation 3 of arXiv 2412.00447); the mean over i is taken of the
    queries, so no V x V map is made. Soft caps of the logits are left out.

    Args:
        view: of a decoder layer.
        axis: "received" averages what j gets over the queries i, "given" what query j spreads over the keys i.

    Raises:
        PlanError: if the view does not hold all queries.
    """
    if view.every_query is None:
        raise PlanError("atp reads the queries of all visual tokens, which this view does not hold.")
    valid = view.valid[:, None, :, None]
    key = view.visual(view.key).float().masked_fill(~valid, 0.0)
    heads, width = view.every_query.shape[1], view.every_query.shape[3]
    index = (view.column - view.first).clamp(min=0)[:, None, :, None].expand(-1, heads, -1, width)
    query = view.every_query.gather(2, index).float().masked_fill(~valid, 0.0)
    # query heads that share a key head are added first
    query = query.unflatten(1, (key.shape[1], -1)).sum(2)
    number = view.valid.sum(1)[:, None, None, None].clamp(min=1)
    one, other = (query, key) if axis == "received" else (key, query)
    logits = ((one.sum(2, keepdim=True) / number) * other).sum((1, 3)) / heads
    return (logits * view.scaling).masked_fill(~view.valid, 0.0)


def spatial_score(row: Tensor, col: Tensor, rates: tuple[float, ...], penalty: float) -> Tensor:
    """[B, V] 1 - R penalty at tokens on the sampled grid of rate R, the best of all rates, at least 0; 0 off the grids.

    The grid of rate R holds every 1 / sqrt(R)-th row and column (equation 5 of arXiv 2412.00447 and its ladder).

    Args:
        row, col: [B, V] cells of the tokens on the grid of their image.
        rates: shares R of the tokens, each 1 / n^2.
        penalty: lambda_sample.
    """
    score = torch.zeros(row.shape, dtype=torch.float32, device=row.device)
    for rate in rates:
        stride = round(1 / math.sqrt(rate))
        there = (row % stride == 0) & (col % stride == 0)
        score = torch.where(there, score.clamp(min=1.0 - rate * penalty), score)
    return score


def module_layers(depth: int) -> tuple[int, ...]:
    """Layers 4, 14 and 24 of 32, behind which the modules sit, moved to a decoder of `depth` layers."""
    return tuple(k - 1 for k in scale_depth((5, 15, 25), 32, depth))


def _to_unit(scores: Tensor, valid: Tensor) -> Tensor:
    """[B, V, n] each score of each prompt moved to [0, 1]; all 0 where all are equal."""
    there = valid[..., None]
    low = scores.masked_fill(~there, math.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~there, -math.inf).amax(1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=_EPSILON)


def _are_grids(rates: Any) -> bool:
    """Every rate is 1 / n^2 of a whole n."""
    if not isinstance(rates, tuple) or not rates or any(type(rate) not in (int, float) for rate in rates):
        return False
    return all(0 < rate <= 1 and abs(1 / math.sqrt(rate) - round(1 / math.sqrt(rate))) < 1e-3 for rate in rates)


@METHODS.register("atp")
@dataclass(frozen=True)
class ATP(LearnedScorer):
    """Behind three decoder layers keeps the tokens that are not redundant, and those on a uniform grid.

    ATP-style: the method of ATP-LLaVA, arXiv 2412.00447, as far as re-implementations and notes give it; the paper's
    text was not at hand. A token stays if S_red > theta_r or S_spa > theta_s. S_red is the mean of `self_attention` and
    of the attention that the instruction pays, both of the layer just run; S_spa is `spatial_score`; both thresholds
    are learned functions of the mean scores of this prompt (`Thresholds`). Survivors keep their positions. Without a
    budget it decides by itself how many stay; with one, the tokens furthest above their threshold stay, fewer behind
    each layer. Trained by `vtprune train atp` with soft masks, which say the same above 1/2.
    Open in the evidence, and therefore options: where the modules sit (0-based 4, 14, 24 of 32 here), the axis of the
    self score, whether scores are normalised, and the ladder of grids. A rotary embedding with two axes is mentioned
    and nowhere defined; positions are the model's own.

    Attributes:
        after: decoder layers behind which modules sit; None is (4, 14, 24) of 32 moved to the model's depth.
        axis: of the self score: "received" or "given".
        normalise: "sum" brings S_red of a prompt to [0, 1] before it meets its threshold, "each" both of its scores
            before they are added (logits and probabilities differ by orders of magnitude, so that otherwise the self
            score alone decides), "none" neither.
        rates: ladder of grids; a single rate only switches one grid on or off.
        penalty: lambda_sample of the spatial score.

    Weights bring the knobs that they were trained with.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "atp"
    summary: ClassVar[str] = "learned thresholds on redundancy and on a uniform grid (ATP-style, arXiv 2412.00447)"
    predictor: ClassVar[type[Thresholds]] = Thresholds
    queries: ClassVar[Queries | None] = "instruction"
    adaptive: ClassVar[bool] = True

    after: tuple[int, ...] | None = None
    axis: Literal["received", "given"] = "received"
    normalise: Literal["sum", "each", "none"] = "sum"
    rates: tuple[float, ...] = (1 / 4, 1 / 9, 1 / 16, 1 / 36)
    penalty: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None:
            rising = all(type(k) is int and a < k for a, k in zip((-1, *self.after), self.after, strict=False))
            if not self.after or not rising:
                raise PlanError(f"atp after must be increasing layers from 0 on, or None, got {self.after!r}.")
        if self.axis not in ("received", "given"):
            raise PlanError(f"atp axis must be 'received' or 'given', got {self.axis!r}.")
        if self.normalise not in ("sum", "each", "none"):
            raise PlanError(f"atp normalise must be 'sum', 'each' or 'none', got {self.normalise!r}.")
        if not _are_grids(self.rates):
            raise PlanError(f"atp rates must be shares 1 / n^2 such as 1/4 or 1/9, got {self.rates!r}.")
        penalty: Any = self.penalty
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or penalty < 0:
            raise PlanError(f"atp penalty must be a number >= 0, got {penalty!r}.")

    @property
    def scores(self) -> dict[str, Any]:
        """The knobs that say what the scores are."""
        return {name: getattr(self, name) for name in ("axis", "normalise", "rates", "penalty")}

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember both scores of the layer that has just run, `self` and `cross` [B, V]."""
        return {"self": self_attention(view, axis=self.axis), "cross": instruction_attention(view)}

    def parts(self, view: TokenView, thresholds: Thresholds) -> tuple[Tensor, Tensor]:
        """How far each token lies above both thresholds: [B, V] S_red - theta_r and S_spa - theta_s."""
        both = torch.stack([view.memory["self"], view.memory["cross"]], 2).masked_fill(~view.valid[..., None], 0.0)
        means = both.sum(1) / view.valid.sum(1, keepdim=True).clamp(min=1)
        limits = thresholds(view.site.index - 1, means)
        if self.normalise == "each":
            both = _to_unit(both, view.valid)
        redundancy = both.mean(2)
        if self.normalise == "sum":
            redundancy = _to_unit(redundancy[..., None], view.valid)[..., 0]
        spatial = spatial_score(view.row, view.col, self.rates, self.penalty)
        return redundancy - limits[:, :1], spatial - limits[:, 1:]

    def soft(self, view: TokenView, thresholds: Thresholds, temperature: float = 10.0) -> Tensor:
        """[B, V] masks of training: the larger sigmoid(temperature x) of both parts (equations 9-11); 0 at padding."""
        redundancy, spatial = self.parts(view, thresholds)
        mask = torch.maximum((redundancy * temperature).sigmoid(), (spatial * temperature).sigmoid())
        return mask.masked_fill(~view.valid, 0.0)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] the larger of both parts: above 0 a token is kept."""
        return torch.maximum(*self.parts(view, self.loaded(Thresholds, view.hidden.device)))

    def count(self, view: TokenView) -> Tensor:
        """[B] tokens above a threshold."""
        return ((self.score(view) > 0) & view.valid).sum(1)

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage behind each module. With a budget the first drops 3/4 of what is to go, the next 3/4 of the rest, ...

        Raises:
            BudgetError: if a budget is given that lies below the floor that the layers set.
            PlanError: if a layer is not one after which something can be saved.
        """
        after = self.after or module_layers(geometry.layers)
        if after[-1] > geometry.layers - 2:
            raise PlanError(
                f"atp after must lie in [0, {geometry.layers - 2}] ({geometry.layers} decoder layers), got {after}."
            )
        scorer = dataclasses.replace(self, after=after)
        sites = [Site("layer", k + 1) for k in after]
        if budget.value is None:
            return Plan(tuple(Stage(site, scorer, 1, adaptive=True) for site in sites))
        entering = max(geometry.entering)
        dropped = [*(1 - 0.25 ** (i + 1) for i in range(len(sites) - 1)), 1.0]

        def build(last: int) -> Plan:
            counts = [math.floor(entering - (entering - last) * share + 0.5) for share in dropped]
            return Plan(tuple(Stage(site, scorer, max(1, n)) for site, n in zip(sites, counts, strict=True)))

        return solve(build, geometry, budget, method=self.name, knob="after")
