"""FlowCut's second cut: what the last prompt token attends to, and resembles, in an early decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry, decoder_layer, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.kernels.value_norms import ValueNorm, value_norms
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.scorers.flowcut_signals import flowcut_score

__all__ = ["FlowCutText"]


@METHODS.register("flowcut-text")
@dataclass(frozen=True)
class FlowCutText(Scorer):
    """Cuts once, before decoder layer K, by the last prompt token's attention, its value's likeness and value norms.

    Paper: FlowCut, arXiv 2505.19536, the cut that follows the vision tower's where images have many tokens; `FlowCut`
    adds it there, and it can be used alone. From layer K-1, over the visual tokens j that are alive:
    r_j = mean over heads of softmax_j(q_last . k_j / sqrt(d)), m_j = mean over heads of softmax_j(v_last . v_j /
    sqrt(d)), score_j = (r_j / sum r + m_j / sum m) * ||mean over heads of v_j||_1.

    r has the model's own factor and soft cap, and leaves out tokens beyond the layer's sliding window; m has neither.
    Differs from the code: no text between images is dropped, and prompts may be padded on either side.
    Reads the last prompt token: assisted decoding is refused, and a prompt's other images take part in the choice.
    Cost: two rows of H x V x d multiply-adds.

    Attributes:
        layer: K, in [1, L); None moves the paper's 2 of 32 layers to the depth of the model.
        positions: "keep", or "compact", which renumbers the sequence after the cut. None follows the code: "compact",
            but "keep" under M-RoPE; also "keep" where layers have sliding windows.
        value_norm: "head_mean" (the code's) or "all_heads" (the paper's), see `vtprune.kernels.value_norms`.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "flowcut-text"
    summary: ClassVar[str] = "FlowCut's text-aware cut in an early decoder layer (arXiv 2505.19536)"
    queries: ClassVar[Queries | None] = "last"

    layer: int | None = None
    positions: Positions | None = None
    value_norm: ValueNorm = "head_mean"

    def __post_init__(self) -> None:
        layer = self.layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise PlanError(f"{self.name} layer must be an int >= 1 or None, got {layer!r}. The paper uses 2.")
        if self.positions not in ("keep", "compact", None):
            raise PlanError(f"{self.name} positions must be 'keep', 'compact' or None, got {self.positions!r}.")
        if self.value_norm not in ("head_mean", "all_heads"):
            raise PlanError(f"{self.name} value_norm must be 'head_mean' or 'all_heads', got {self.value_norm!r}.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """The layer's score of each visual token, [B, V] fp32, 0 at padding."""
        seen = view.valid
        if view.real is not None:
            seen = seen & view.real.gather(1, view.column)
        visual = view.visual(view.value)
        attention = attention_rows(view.query, view.visual(view.key), view.scaling, softcap=view.softcap, real=seen)
        likeness = attention_rows(view.query_value, visual, visual.shape[-1] ** -0.5, real=view.valid)
        norms = value_norms(view.value, view.column, self.value_norm)
        return {"score": flowcut_score(attention[:, 0], likeness[:, 0], norms, view.valid)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] fp32, not negative."""
        return view.memory["score"]

    def stage(self, geometry: Geometry, keep: int | float) -> Stage:
        """The cut to `keep` on a model of this geometry, with layer and positions resolved.

        Raises:
            PlanError: if K is not a layer of the model.
        """
        layer = decoder_layer(self.name, self.layer, (2, 32), geometry.layers)
        positions = self.positions
        if positions is None:
            positions = "keep" if geometry.rotary_axes > 1 or geometry.windows else "compact"
        return Stage(Site("layer", layer), self, keep, positions=positions)

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage before layer K.

        Raises:
            BudgetError: if the budget is missing or below the floor that K sets.
            PlanError: if K is not a layer of the model.
        """
        return solve(lambda n: Plan((self.stage(geometry, n),)), geometry, budget, method=self.name, knob="layer")
