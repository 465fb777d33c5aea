"""GemFilter: ask a middle layer what the last token looks for, and start again with that."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from vtprune.budget import Budget, Geometry, decoder_layer, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Positions, Site, Stage

__all__ = ["GemFilter", "filter_scores"]


def filter_scores(
    query: Tensor, key: Tensor, real: Tensor | None = None, *, pool: int = 5, count_include_pad: bool = True
) -> Tensor:
    """Raw products of one query with all keys, summed over the heads and smoothed along the sequence.

    raw_j = sum_h q_h . k_hj, without scale and softmax; then the mean of `pool` neighbours.

    Args:
        query: [B, H, 1, d] after RoPE.
        key: [B, Hkv, N, d] after RoPE; H is a multiple of Hkv.
        real: [B, N] keys that are part of the sequence; None is all. Others count like the outside of it.
        pool: odd window; 1 leaves the products alone.
        count_include_pad: at the ends divide by the whole window (as the authors' code does) instead of by its part
            inside the sequence, which pulls the ends towards 0.

    Returns:
        [B, N] fp32.
    """
    batch, heads, _, width = query.shape
    # heads of a group share a key, so their queries can be added first
    grouped = query.float().reshape(batch, key.shape[1], heads // key.shape[1], width).sum(2)
    raw = (grouped[:, :, None] @ key.float().transpose(2, 3)).sum(1)[:, 0]
    if real is not None:
        raw = raw.masked_fill(~real, 0.0)
    if pool == 1:
        return raw
    pooled = functional.avg_pool1d(raw[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    if count_include_pad:
        return pooled
    inside = raw.new_ones(raw.shape) if real is None else real.float()
    share = functional.avg_pool1d(inside[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    return pooled / share.clamp(min=1.0 / pool)


@METHODS.register("gemfilter")
@dataclass(frozen=True)
class GemFilter(Scorer):
    """Runs the first layers on everything, keeps what the last prompt token looks for there, and starts again.

    Paper: GemFilter, arXiv 2409.17422, on text; here it selects visual tokens and keeps all text, unless told
    otherwise. The decoder runs up to the queries and keys of layer r, without a cache; `filter_scores` of the last
    prompt token rank the tokens; then the whole decoder runs on the survivors. The authors' code runs layer r to its
    end, whose result nobody reads.
    Differs from both: survivors keep their positions unless told otherwise, so that the run equals the unpruned model
    with the same tokens hidden, and works under M-RoPE and sliding windows alike.
    The first pass costs r of L layers on every token, so the average over the layers cannot fall below r V / L; it pays
    for long visual prompts, many new tokens, or behind a method that cuts in the tower.

    Attributes:
        layer: r, in [0, L); None moves the paper's 13 of 32 (LLaMA 3.1) to the depth of the model. Models differ:
            `vtprune calibrate gemfilter` finds it.
        pool: odd window of the smoothing; the paper uses 5.
        count_include_pad: see `filter_scores`.
        positions: "keep", or "compact" (the paper's: survivors are numbered from 0).
        tokens: "visual" keeps all text. "any" is the paper's: text and visual tokens compete for as many places as all
            text and the budget's visual tokens would fill, so that it costs the same. Only the prompt's last token is
            sure to stay, because the answer begins there (the authors' code may lose it). Logits of text that left are
            those of a zero state, so do not train on them.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "gemfilter"
    summary: ClassVar[str] = "what the last token looks for in a middle layer, then a second pass (arXiv 2409.17422)"
    queries: ClassVar[Queries | None] = "last"

    layer: int | None = None
    pool: int = 5
    count_include_pad: bool = True
    positions: Positions = "keep"
    tokens: Literal["visual", "any"] = "visual"

    def __post_init__(self) -> None:
        layer = self.layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise PlanError(f"gemfilter layer must be an int >= 0 or None, got {layer!r}. The paper uses 13 of 32.")
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1 or self.pool % 2 == 0:
            raise PlanError(f"gemfilter pool must be an odd int >= 1, got {self.pool!r}. The paper uses 5.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"gemfilter positions must be 'keep' or 'compact', got {self.positions!r}.")
        if self.tokens not in ("visual", "any"):
            raise PlanError(f"gemfilter tokens must be 'visual' or 'any', got {self.tokens!r}.")

    @property
    def drops_text(self) -> bool:
        """See `Scorer.drops_text`."""
        return self.tokens == "any"

    def score_rows(self, view: AttentionView) -> Tensor:
        """[B, M] smoothed products of all tokens. Keys of earlier calls are not part of the sequence."""
        real = None if view.real is None else view.real[:, view.first :]
        key = view.key[:, :, view.first :]
        return filter_scores(view.query, key, real, pool=self.pool, count_include_pad=self.count_include_pad)

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember the smoothed products, `product` [B, V]."""
        return {"product": self.score_rows(view).gather(1, view.column - view.first)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] smoothed products, fp32."""
        return view.memory["product"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage at `restart[r]`.

        Raises:
            BudgetError: if the budget is missing or below what the first pass costs.
            PlanError: if r is not a layer of the model.
        """
        layer = decoder_layer(self.name, self.layer, (13, 32), geometry.layers, lowest=0)
        scorer = dataclasses.replace(self, layer=layer)
        return solve(
            lambda n: Plan((Stage(Site("restart", layer), scorer, n, positions=self.positions),)),
            geometry,
            budget,
            method=self.name,
            knob="layer",
        )
