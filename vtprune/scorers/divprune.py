"""DivPrune: the subset whose closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS, Scorer
from vtprune.plan import Site
from vtprune.selections.max_min import MaxMin

__all__ = ["DivPrune"]


@METHODS.register("divprune")
@dataclass(frozen=True)
class DivPrune(Scorer):
    """Greedy max-min diversity of the projected visual tokens, before the decoder. Reads no attention and no text.

    Paper: DivPrune, arXiv 2503.02175. With D_ij = 1 - cos(x_i, x_j), the first token is the one farthest from its
    nearest neighbour, argmax_i min_{j != i} D_ij; each next one is the farthest from all that are kept, argmax_i
    min_{j kept} D_ij.
    Here distances are compared in steps of 2**-20: equal tokens (flat background) then tie exactly whatever the order
    of the sums, and a tie goes to the earlier token, so that the result does not depend on batch mates or device.
    Written from the formula; the authors' code was not used.
    Cost: O(V^2 D) in blocks for the first token and O(V D) for each further one; no [V, V] matrix is kept.
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "greedy max-min diversity of the tokens before the decoder (arXiv 2503.02175)"
    site: ClassVar[Site | None] = Site("input")

    @property
    def selection(self) -> MaxMin:
        """The rule itself: there is no score."""
        return MaxMin()
