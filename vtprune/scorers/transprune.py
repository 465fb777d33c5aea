"""TransPrune: tokens that decoder layers change much, and that the instruction attends to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView, TransitionView
from vtprune.errors import PlanError
from vtprune.kernels.transition import transition
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.scorers.instruction import instruction_attention
from vtprune.scorers.schedule import check_schedule, scheduled_layers, scheduled_plan

__all__ = ["TransPrune", "transition_variation"]

# of the sums that both signals are divided by
_EPSILON = 1e-8


def transition_variation(
    before: Tensor, after: Tensor, real: Tensor | None = None, *, direction: Literal["signed", "absolute"] = "signed"
) -> Tensor:
    """How much a sublayer changes each token: ||after|| / ||before|| times a softmax of the turn it makes.

    w_i = m_i exp(1 - c_i) / sum_j exp(1 - c_j), m_i the ratio of the norms and c_i the cosine of before and after.

    Args:
        before: [B, N, D] what goes into the sublayer.
        after: [B, N, D] what comes out, before it is added to the residual stream.
        real: [B, N] tokens that count; None is all.
        direction: "signed" takes 1 - c, as the authors' code does; "absolute" 1 - |c|, as the paper writes.

    Returns:
        [B, N] fp32; 0 where not real.
    """
    magnitude, cosine = transition(before, after)
    turn = 1.0 - (cosine.abs() if direction == "absolute" else cosine)
    if real is not None:
        turn = turn.masked_fill(~real, float("-inf"))
    # a sample of padding alone would be NaN; its tokens are never read
    share = turn.softmax(1).nan_to_num(0.0)
    return share * (magnitude if real is None else magnitude.masked_fill(~real, 0.0))


@METHODS.register("transprune")
@dataclass(frozen=True)
class TransPrune(Scorer):
    """Cuts three times in the decoder's first half, by how tokens change there and by what the instruction looks at.

    Paper: TransPrune, arXiv 2507.20630. Two signals: token transition variation (`transition_variation`), of the
    attention and the MLP of each layer, summed from the layer in front of the first cut on; and instruction-guided
    attention, the mean attention of the tokens behind the last image in the layer behind the cut, asked about the
    tokens in front of it. score = alpha TTV / sum TTV + (1 - alpha) IGA / sum IGA over the visual tokens.
    The paper cuts 576 tokens to 504, 360 and 72 before layers 7, 9 and 12 of 32. Other budgets keep the shares that the
    cuts have in what is dropped (1/7, 3/7, all), and other depths the relative places. Low budgets are out of reach by
    itself, since the first layers see every token: put it behind a method that cuts in the tower or at the input.

    Where paper and code differ the code's way is the default: signed cosines, both signals divided by their sums.
    Differs from both: survivors keep their positions unless told otherwise, so that the run equals the unpruned model
    with the same tokens hidden, and works under M-RoPE and sliding windows alike.
    Differs from the code: the softmax over transitions is taken over the tokens of a sample and not of the batch; the
    tokens behind the *last* image ask; no transition is computed in decode steps; text that stands between images is
    never counted as image.
    Cost: two norms and a product a sublayer, and at each cut the queries, keys and values of one layer, which are
    computed again when that layer runs (counted in the report).

    Attributes:
        layers: decoder layers before which is cut, increasing; None moves the paper's (7, 9, 12) of 32 to the model.
        ratios: share of the visual tokens that each cut leaves at the paper's budget ("High"); without a budget they
            are used as they are.
        alpha: weight of the transitions, in [0, 1].
        signals: "both", "ttv" (transitions alone) or "iga" (attention alone).
        direction: "signed" or "absolute" cosine.
        normalise: divide both signals by their sums; False compares them raw, as the paper writes.
        since: first layer whose transitions count; None is the one in front of the first cut, also the latest one.
        positions: "keep", or "compact" (the paper's: the sequence is renumbered after each cut).

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "transprune"
    summary: ClassVar[str] = "token transitions and instruction attention at three depths (arXiv 2507.20630)"
    queries: ClassVar[Queries | None] = "instruction"
    adaptive: ClassVar[bool] = True
    ahead: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    signals: Literal["both", "ttv", "iga"] = "both"
    direction: Literal["signed", "absolute"] = "signed"
    normalise: bool = True
    since: int | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        if self.signals not in ("both", "ttv", "iga"):
            raise PlanError(f"transprune signals must be 'both', 'ttv' or 'iga', got {self.signals!r}.")
        if self.direction not in ("signed", "absolute"):
            raise PlanError(f"transprune direction must be 'signed' or 'absolute', got {self.direction!r}.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"transprune positions must be 'keep' or 'compact', got {self.positions!r}.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0.0 <= self.alpha <= 1.0:
            raise PlanError(f"transprune alpha must be a number in [0, 1], got {self.alpha!r}. The paper uses 0.5.")
        check_schedule(self.name, self.layers, self.ratios)
        if self.since is not None and (type(self.since) is not int or self.since < 0):
            raise PlanError(f"transprune since must be a layer >= 0 or None, got {self.since!r}.")

    @property
    def reads_attention(self) -> bool:
        """See `Scorer.reads_attention`."""
        return self.signals != "ttv"

    @property
    def reads_transitions(self) -> bool:
        """See `Scorer.reads_transitions`."""
        return self.signals != "iga"

    def watches(self, site: Site) -> range:
        """Layers whose transitions count before a cut at `site`."""
        latest = site.index - 1
        return range(latest if self.since is None else min(self.since, latest), site.index)

    def observe_transition(self, view: TransitionView, memory: Memory) -> Memory:
        """Add a sublayer's transitions to `ttv`, [B, V]."""
        variation = transition_variation(view.before, view.after, view.real, direction=self.direction)
        mine = variation.gather(1, view.column)
        return {**memory, "ttv": mine + memory["ttv"] if "ttv" in memory else mine}

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what the instruction attends to, `iga` [B, V], the mean over its tokens."""
        return {**memory, "iga": instruction_attention(view)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] weighted sum of the signals, fp32, not negative."""
        parts = {"ttv": self.alpha, "iga": 1.0 - self.alpha} if self.signals == "both" else {self.signals: 1.0}
        score = torch.zeros(view.valid.shape, dtype=torch.float32, device=view.valid.device)
        for name, weight in parts.items():
            signal = view.memory[name].masked_fill(~view.valid, 0.0)
            if self.normalise:
                signal = signal / (signal.sum(1, keepdim=True) + _EPSILON)
            score = score + weight * signal
        return score

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage before each of `layers`.

        Raises:
            BudgetError: if the budget is below the floor that the layers set.
            PlanError: if a layer is not one of the model.
        """
        layers = scheduled_layers(self.name, self.layers, (7, 9, 12), self.ratios, geometry.layers)
        since = layers[0] - 1 if self.since is None else self.since
        since = min(since, layers[0] - 1)
        scorer = dataclasses.replace(self, since=since)
        return scheduled_plan(
            self.name,
            layers,
            self.ratios,
            # cut off without a budget, as the authors' code does
            lambda site, n: Stage(site, scorer, n, positions=self.positions),
            geometry,
            budget,
        )
