"""CDPruner: a determinantal point process of the features, conditioned on the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Site
from vtprune.selections.dpp import DPP
from vtprune.similarity import unit_states

__all__ = ["CDPruner"]


@METHODS.register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Scorer):
    """Keeps tokens that are relevant to the question and unlike each other, by greedy MAP of a conditional DPP.

    Paper: CDPruner, arXiv 2506.10967. L_ij = r_i cos(x_i, x_j) r_j on the projected features, r the relevance scaled to
    (0, 1]; the greedy set of largest determinant (`vtprune.selections.dpp`).
    The paper's relevance compares CLIP image tokens with the question in CLIP's text tower (with a minus sign). No
    model that is served here brings a text tower, so this does what the paper's port to such models does (Qwen in
    openvino.genai): r_i = mean over instruction tokens t of cos(x_i, e_t), e_t the decoder's embeddings of
    the tokens behind the last image, with a plus sign. A prompt without any is judged by diversity alone.
    Differs from the authors' code: r is scaled within each sample and not over the batch.
    Positions: survivors keep theirs; the code for LLaVA-1.5 closes the gaps up.
    Cost: O(V (D + t)) for step t of T, and V x R cosines with R instruction tokens; no [V, V] matrix.

    Attributes:
        theta: weight of relevance against diversity, in [0, 1): see `DPP`; None multiplies by r as it is.

    Raises:
        PlanError: if theta is out of range.
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "DPP of the tokens, conditioned on the question, before the decoder (arXiv 2506.10967)"
    site: ClassVar[Site | None] = Site("input")
    reads_text: ClassVar[bool] = True

    theta: float | None = None

    def __post_init__(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> DPP:
        """The set that is made of the relevance."""
        return DPP(self.theta)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] relevance, fp32, in [-1, 1] in steps of 2**-20; 0 without an instruction."""
        text = view.text
        if text is None:
            raise PlanError("cdpruner reads the prompt's text, which was not given.")
        words = functional.normalize(text.hidden.detach().float(), dim=2)
        words = words.masked_fill(~text.behind[..., None], 0.0)
        # the mean of cosines is the cosine with the mean of unit vectors
        question = words.sum(1) / text.behind.sum(1, keepdim=True).clamp(min=1)
        relevance = torch.bmm(unit_states(view.hidden, view.valid), question[..., None])[..., 0]
        return (relevance * 2**20).round() * 2.0**-20
