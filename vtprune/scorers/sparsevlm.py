"""SparseVLM: words that concern the picture rate its tokens, and some of what leaves is recycled."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.remainders.drop import Drop
from vtprune.remainders.recycle import Recycle
from vtprune.scorers.schedule import scheduled_layers, solve_finely

__all__ = ["SparseVLM"]

# shares of the visual tokens behind each cut: none, the authors' literals for 64, 96, 128 and 192 of 576, and all
_TABLE = (
    (0.0, 0.0, 0.0),
    (66 / 576, 30 / 576, 17 / 576),
    (238 / 576, 48 / 576, 26 / 576),
    (303 / 576, 110 / 576, 36 / 576),
    (300 / 576, 200 / 576, 110 / 576),
    (1.0, 1.0, 1.0),
)


@METHODS.register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Scorer):
    """Cuts behind three decoder layers by what the words that concern the picture attend to; recycles part of the rest.

    Paper: SparseVLM, arXiv 2410.04417. On the decoder's input, with visual states v and those of the tokens t behind
    the last image, M_t = mean over v of softmax over t of v.t; the raters are the words with M_t above the mean of M.
    Behind each of `layers`, score_j = mean over heads and raters of the layer's attention to token j (softmax over all
    keys). Of the tokens that are not selected the best are clustered, and the clusters' means survive
    (`vtprune.remainders.recycle`).
    Counts: the authors' code has literals for 64, 96, 128 and 192 of 576 tokens (its rank-adaptive counts are not in
    it). Those shares, and straight lines between them, make the schedule here; the budget is what enters the layers on
    average, recycled tokens included, so that "192" of the authors is 203 here.
    Differs from the code: recycled tokens count among the survivors and stand where their centres stood, where the code
    adds them behind the others; survivors keep their positions unless told otherwise (its second version keeps them
    too where it does not merge).
    Cost: R rows of attention in three layers, R the words behind the image, of which only the raters count.

    Attributes:
        layers: decoder layers behind which is cut, increasing; None moves the paper's (2, 6, 15) of 32 to the model.
        recycle: the rest is recycled; False drops it.
        positions: "keep", or "compact", which renumbers the sequence after each cut.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "attention of the words that concern the picture, with recycling (arXiv 2410.04417)"
    queries: ClassVar[Queries | None] = "instruction"
    reads_input: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    recycle: bool = True
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        layers = self.layers
        if layers is not None and (
            len(layers) != 3 or any(a >= b for a, b in zip((-1, *layers), layers, strict=False))
        ):
            raise PlanError(f"sparsevlm layers must be 3 increasing numbers from 0 on, got {layers!r}.")
        if not isinstance(self.recycle, bool):
            raise PlanError(f"sparsevlm recycle must be True or False, got {self.recycle!r}.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"sparsevlm positions must be 'keep' or 'compact', got {self.positions!r}.")

    @property
    def remainder(self) -> Recycle | Drop:
        """What becomes of tokens that are not selected."""
        return Recycle() if self.recycle else Drop()

    def prepare(self, view: TokenView) -> Memory:
        """Who rates: `raters` [B, V, R], 1 at words behind the last image that do, the same for all tokens."""
        text = view.text
        if text is None:
            raise PlanError("sparsevlm reads the prompt's text, which was not given.")
        words = text.hidden.detach().float().masked_fill(~text.behind[..., None], 0.0)
        visual = view.hidden.detach().float().masked_fill(~view.valid[..., None], 0.0)
        logits = (visual @ words.transpose(1, 2)).masked_fill(~text.behind[:, None], torch.finfo(torch.float32).min)
        share = logits.softmax(2).masked_fill(~(text.behind[:, None] & view.valid[..., None]), 0.0)
        mean = share.sum(1) / view.valid.sum(1, keepdim=True).clamp(min=1)
        count = text.behind.sum(1, keepdim=True)
        typical = mean.sum(1, keepdim=True) / count.clamp(min=1)
        rates = (mean > typical * (1.0 + 1e-6)) & text.behind
        # words that all concern it alike rate alike
        rates = rates.where(rates.any(1, keepdim=True), text.behind)
        # rows that ask come without the text in front of the image
        order = torch.argsort((~text.behind).to(torch.uint8), dim=1, stable=True)[:, : int(count.max())]
        return {"raters": rates.gather(1, order).float()[:, None].expand(-1, view.valid.shape[1], -1)}

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """What the raters attend to, `attention` [B, V]."""
        rows = attention_rows(
            view.query, view.key, view.scaling, softcap=view.softcap, real=view.real, column=view.column
        )
        weight = memory["raters"][:, :1].transpose(1, 2) if rows.shape[2] else rows.new_zeros(rows.shape[0], 1, 1)
        if view.rows is not None:
            rows = rows.masked_fill(~view.rows[..., None], 0.0)
        return {**memory, "attention": (weight * rows).sum(1) / weight.sum(1).clamp(min=1.0)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention weight, fp32, in [0, 1]."""
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage behind each of `layers`.

        Raises:
            BudgetError: if the budget is missing or below the floor that the layers set.
            PlanError: if a layer is not one of the model, or has none behind it.
        """
        given = None if self.layers is None else tuple(k + 1 for k in self.layers)
        layers = scheduled_layers(self.name, given, (3, 7, 16), _TABLE[1], geometry.layers)
        entering = max(geometry.entering)

        def build(last: float) -> Plan:
            counts = [max(1, math.floor(entering * share + 0.5)) for share in _shares(last / max(1, entering))]
            stages = (
                Stage(Site("layer", k), self, n, positions=self.positions) for k, n in zip(layers, counts, strict=True)
            )
            return Plan(tuple(stages))

        return solve_finely(build, geometry, budget, method=self.name, knob="layers")


def _shares(last: float) -> tuple[float, ...]:
    """Shares behind each cut, if `last` is the one behind the last: a straight line between rows of the table."""
    for low, high in itertools.pairwise(_TABLE):
        if last <= high[2]:
            part = (last - low[2]) / (high[2] - low[2])
            return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))
    return _TABLE[-1]
