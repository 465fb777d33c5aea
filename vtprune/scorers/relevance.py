"""Relevance: a small net reads the first layer's attention, and foretells what the answer will depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.predictors import RelevanceNet
from vtprune.scorers.instruction import instruction_attention
from vtprune.scorers.learned import LearnedScorer

__all__ = ["Relevance"]


@METHODS.register("relevance")
@dataclass(frozen=True)
class Relevance(LearnedScorer):
    """Drops visual tokens before the decoder, by the relevance that a trained net predicts.

    Paper: "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective", arXiv
    2506.01097; its code is not public. The first decoder layer is asked what the instruction (the tokens behind the
    last image) attends to: full softmax, visual columns, mean over heads and instruction tokens. A 1-D convolutional
    net (`RelevanceNet`) turns that into one score a visual token, and the decoder runs on the best. The net is trained
    by `vtprune train relevance` on how much the full model's answers depend on each token (gradient-weighted attention
    of all layers), one net a model; it reads any number of tokens.
    Not published, and chosen here: the mean over heads, the net's kernel, activation, head and scale of input (see
    there), and positions.
    Cost: the queries, keys and values of one layer for all tokens, which are computed again for the survivors when that
    layer runs, and the net.
    Behind a method that cuts earlier the net reads the survivors side by side, which it was not trained on.

    Attributes:
        positions: "keep" leaves survivors their positions, so that the run equals the unpruned model with the same
            tokens hidden; "compact" numbers them from 0.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "relevance"
    summary: ClassVar[str] = "a learned net on what the instruction attends to in layer 0 (arXiv 2506.01097)"
    predictor: ClassVar[type[RelevanceNet]] = RelevanceNet
    queries: ClassVar[Queries | None] = "instruction"

    positions: Positions = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"relevance positions must be 'keep' or 'compact', got {self.positions!r}.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what the instruction attends to, `attention` [B, V]; what the net reads."""
        return {"attention": instruction_attention(view)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] the net's logits, fp32; their softmax is the predicted relevance."""
        net = self.loaded(RelevanceNet, view.hidden.device)
        return net(view.memory["attention"], view.valid)

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage at `restart[0]`, where layer 0 is asked before the decoder runs.

        Raises:
            BudgetError: if the budget is missing or malformed.
        """
        site = Site("restart", 0)
        return solve(
            lambda n: Plan((Stage(site, self, n, positions=self.positions),)), geometry, budget, method=self.name
        )
