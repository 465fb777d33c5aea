"""DART: what is least like a few pivots stays, because duplicates are what can go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.budget import Budget, Geometry, decoder_layer, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView, top_k_mask
from vtprune.errors import PlanError
from vtprune.plan import Plan, Positions, Site, Stage
from vtprune.similarity import cosine_distance, unit_states

__all__ = ["DART"]


@METHODS.register("dart")
@dataclass(frozen=True)
class DART(Scorer):
    """Cuts once, before decoder layer K, and keeps a few pivots and the tokens that are least like them.

    Paper: DART, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv
    2502.11494. Pivots are the visual and the text tokens whose keys in layer K - 1 have the largest L1 norm (all heads,
    after RoPE). The visual pivots stay. Then each pivot, the visual ones first and the largest norm first, keeps the
    ceil(rest / pivots) visual tokens whose states have the lowest cosine with its own, those that are kept already
    excepted, until there are T.
    The released code was not available: this follows the paper and two ports. It differs from the ports where they
    differ from the paper (they cut at other layers; one rounds the share of a pivot down and stays below the budget).
    Chosen here: the order of pivots, fewer pivots where a prompt has fewer tokens or the budget fewer places, and
    cosines in steps of 2**-20, a tie going to the earlier token. No attention is computed.
    Layers below K see all V tokens, so the average over L layers cannot fall below (K V + L - K) / L.
    Cost: V x D multiply-adds for each pivot.

    Attributes:
        layer: K, in [1, L); None moves the paper's 2 of 32 layers to the depth of the model.
        visual: visual pivots, at least one. The paper's 4.
        text: text pivots. The paper's 4.
        positions: "keep", or "compact", which renumbers the sequence after the cut.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "least like a few pivots, early in the decoder (arXiv 2502.11494)"
    queries: ClassVar[Queries | None] = "last"
    reads_text: ClassVar[bool] = True

    layer: int | None = None
    visual: int = 4
    text: int = 4
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        layer = self.layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise PlanError(f"dart layer must be an int >= 1 or None, got {layer!r}. The paper cuts before layer 2.")
        for knob, lowest in (("visual", 1), ("text", 0)):
            value = getattr(self, knob)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise PlanError(f"dart {knob} must be an int >= {lowest}, got {value!r}. The paper uses 4.")
        if self.positions not in ("keep", "compact"):
            raise PlanError(f"dart positions must be 'keep' or 'compact', got {self.positions!r}.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Norms of keys: `norm` [B, V], and `words` [B, V, text], the same for all tokens of a sample.

        `words` are the numbers of the text tokens with the largest norms, among the text tokens in order, largest
        first; -1 where there are not so many.
        """
        norm = view.key.float().abs().sum((1, 3))
        mine = norm.gather(1, view.column).masked_fill(~view.valid, 0.0)
        words = torch.ones_like(norm, dtype=torch.bool) if view.real is None else view.real.clone()
        words[:, : view.first] = False
        # padding of the V axis points at rows that may be text
        seen = torch.zeros_like(norm).scatter_add_(1, view.column, view.valid.float())
        words &= seen == 0
        order = norm.masked_fill(~words, -1.0).argsort(dim=1, descending=True, stable=True)[:, : self.text]
        number = (words.cumsum(1) - 1).gather(1, order).masked_fill(~words.gather(1, order), -1)
        number = functional.pad(number, (0, self.text - number.shape[1]), value=-1)
        return {"norm": mine, "words": number[:, None].expand(-1, mine.shape[1], -1).float()}

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True at the chosen tokens, `view.keep[b]` of them a sample."""
        valid = view.valid
        if view.text is None:
            raise PlanError("dart reads the prompt's text, which was not given.")
        if not valid.shape[1]:
            return valid.clone()
        norm = view.memory["norm"]
        kept = top_k_mask(norm, view.keep.clamp(max=self.visual), valid)
        first = norm.masked_fill(~kept, -1.0).argsort(dim=1, descending=True, stable=True)[:, : self.visual]
        states = unit_states(view.hidden, valid)
        words = view.memory["words"][:, 0].long()
        mine = states.gather(1, first[..., None].expand(-1, -1, states.shape[2]))
        width = view.text.hidden.shape[1]
        there = (words >= 0) & (words < width)
        at = words.clamp(0, max(0, width - 1))[..., None].expand(-1, -1, states.shape[2])
        theirs = functional.normalize(view.text.hidden.detach().float().gather(1, at), dim=2) if width else mine[:, :0]
        pivots = torch.cat([mine, theirs], 1)
        used = torch.cat([kept.gather(1, first), there[:, : theirs.shape[1]]], 1)
        left = view.keep.minimum(valid.sum(1)) - kept.sum(1)
        share = -(-left // used.sum(1).clamp(min=1))
        for number in range(pivots.shape[1]):
            take = share.minimum(left).where(used[:, number], 0)
            distance = cosine_distance(torch.bmm(states, pivots[:, number, :, None])[..., 0])
            chosen = top_k_mask(distance, take, valid & ~kept)
            kept, left = kept | chosen, left - chosen.sum(1)
        return kept

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage before layer K.

        Raises:
            BudgetError: if the budget is missing or below the floor that K sets.
            PlanError: if K is not a layer of the model.
        """
        site = Site("layer", decoder_layer(self.name, self.layer, (2, 32), geometry.layers))
        return solve(
            lambda n: Plan((Stage(site, self, n, positions=self.positions),)),
            geometry,
            budget,
            method=self.name,
            knob="layer",
        )
