"""DyVTE: all visual tokens leave at the layer after which the text has taken what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, TokenView
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.predictors import ExitGates
from vtprune.scorers.learned import LearnedScorer

__all__ = ["DyVTE", "exit_features"]


def exit_features(text: Tensor, real: Tensor, read: Tensor) -> Tensor:
    """What a gate reads of a prompt: the mean of its text tokens, and its last one (arXiv 2411.19628, eq. 2).

    Args:
        text: [B, R, D] states of the text tokens in order, padded at the end.
        real: [B, R] False at that padding.
        read: [B, R] True at those that the mean may read; the last token is left out of it.

    Returns:
        [B, 2D] fp32. The mean of nothing is zero.
    """
    last = real.sum(1, keepdim=True) - 1
    at = torch.arange(text.shape[1], device=text.device)[None]
    mean_of = (read & real & (at != last)).float()
    # padding may hold anything, and nothing times zero is not always zero
    states = text.float().masked_fill(~real[..., None], 0.0)
    mean = torch.einsum("br,brd->bd", mean_of, states) / mean_of.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([mean, states.gather(1, last[..., None].expand(-1, 1, states.shape[2]))[:, 0]], 1)


@METHODS.register("dyvte")
@dataclass(frozen=True)
class DyVTE(LearnedScorer):
    """Asks a small gate after each decoder layer, and drops every visual token of a sample once its gate says so.

    Paper: DyVTE, arXiv 2411.19628. The gate reads the mean of the text tokens behind the image and the last prompt
    token (`exit_features`); it says "leave" where that logit is the larger one. Only the prefill is asked; that no gate
    ever says so is legal. What is left keeps its positions. It decides by itself, so it takes no budget; `margin` moves
    it. Trained by `vtprune train dyvte`.
    The paper writes that the mean is taken over "all previous text tokens", its code takes those behind the image:
    `read`.

    Attributes:
        margin: how much larger the logit of leaving must be; above 0 tokens stay longer.
        first: the earliest layer after which they may leave, 0-based.
        exit_layer: leave after this layer, whatever the gates say (the paper's static exit); needs no weights.
        read: "behind" the last image, or "all" text; weights bring what they were trained with.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "dyvte"
    summary: ClassVar[str] = "a learned gate lets all visual tokens leave after some layer (arXiv 2411.19628)"
    predictor: ClassVar[type[ExitGates]] = ExitGates
    adaptive: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    margin: float = 0.0
    first: int = 0
    exit_layer: int | None = None
    read: Literal["behind", "all"] = "behind"

    def __post_init__(self) -> None:
        super().__post_init__()
        margin: Any = self.margin
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise PlanError(f"dyvte margin must be a number, got {margin!r}. The paper's is 0.")
        for name, value in (("first", self.first), ("exit_layer", self.exit_layer)):
            if value is None and name == "exit_layer":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise PlanError(f"dyvte {name} must be a layer, an int >= 0, got {value!r}.")
        if self.read not in ("behind", "all"):
            raise PlanError(f"dyvte read must be 'behind' or 'all', got {self.read!r}.")

    @property
    def needs_weights(self) -> bool:
        """See `LearnedScorer`."""
        return self.exit_layer is None

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage behind each layer from `first` on but the last; each drops all or nothing.

        Raises:
            BudgetError: if a budget is given.
            PlanError: if `first` or `exit_layer` is not a layer after which something can be saved.
        """
        if budget.is_all(geometry.visual_tokens):
            return Plan((Stage(Site("layer", 1), self, 1.0),))
        if budget.value is not None:
            raise BudgetError(
                f"dyvte decides by itself when tokens leave and takes no budget, got {budget}. Leave keep out; the "
                "knob 'margin' makes it leave earlier (below 0) or later, 'exit_layer' after a fixed layer."
            )
        last, name = geometry.layers - 2, "first" if self.exit_layer is None else "exit_layer"
        first = self.first if self.exit_layer is None else self.exit_layer
        if first > last:
            raise PlanError(
                f"dyvte {name} must be in [0, {last}] ({geometry.layers} decoder layers; after the last one nothing is "
                f"left to save), got {first}."
            )
        layers = range(first, last + 1) if self.exit_layer is None else (first,)
        return Plan(tuple(Stage(Site("layer", layer + 1), self, 0, adaptive=True) for layer in layers))

    def features(self, view: TokenView) -> Tensor:
        """[B, 2D] what the gate of this stage reads."""
        if view.text is None:
            raise PlanError("dyvte reads text, which this view does not hold.")
        read = view.text.real if self.read == "all" else view.text.behind
        return exit_features(view.text.hidden, view.text.real, read)

    def count(self, view: TokenView) -> Tensor:
        """[B] none where the gate says "leave", else all."""
        alive = view.valid.sum(1)
        if self.exit_layer is not None:
            return torch.zeros_like(alive)
        gates = self.loaded(ExitGates, view.hidden.device)
        stay, leave = gates(view.site.index - 1, self.features(view)).unbind(1)
        return torch.where(leave - stay > self.margin, 0, alive)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] equal scores: all tokens stay or none."""
        return torch.zeros(view.valid.shape, device=view.valid.device)
