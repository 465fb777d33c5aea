"""The two rules beside a score: which tokens survive (Selection), and what happens to the rest (Remainder).

A stage carries one of each, or leaves them to its scorer. Axes as in `vtprune.views`: B samples, V visual tokens alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.registry import Registry, load_entry, write_entry
from vtprune.views import TokenView

__all__ = ["REMAINDERS", "SELECTIONS", "Merge", "Remainder", "Selection", "own_index", "require_scores", "top_k_mask"]


def top_k_mask(scores: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """Keep the `keep[b]` best valid tokens of each sample; equal scores go to the earlier token.

    Args:
        scores: [B, V], higher is kept. Compared in fp32; NaN counts as lowest.
        keep: [B] survivors a sample.
        valid: [B, V].

    Returns:
        [B, V] bool.
    """
    ranked = scores.float().nan_to_num(nan=float("-inf"))
    ranked = ranked.masked_fill(~valid, float("-inf"))
    # invalid tokens lie at the end of the axis, so a stable sort never prefers them to a valid -inf
    order = ranked.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < keep[:, None]) & valid


def require_scores(scores: Tensor | None, rule: str) -> Tensor:
    """`scores`.

    Raises:
        PlanError: if there are none.
    """
    if scores is None:
        raise PlanError(f"{rule} needs a score for every token, and got none. Use it with a method that scores.")
    return scores


def own_index(mask: Tensor) -> Tensor:
    """[B, V] the index of each token on the V axis: an owner table in which every token owns itself."""
    return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)


@dataclass(frozen=True)
class Selection:
    """How a set is made of scores: a frozen dataclass under `@SELECTIONS.register("name")`. It holds no state.

    Attributes:
        name: registry key.
        summary: one line for listings, with the source.
        adaptive: `count` decides how many survive; its stage must be adaptive too.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    adaptive: ClassVar[bool] = False

    @property
    def needs_scores(self) -> bool:
        """It works only on a scorer that scores."""
        return False

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """[B, V] bool: the tokens that survive, `view.keep[b]` of them a sample (all, if fewer are alive).

        Args:
            view: what there is to choose from.
            scores: [B, V], higher is better, anything at invalid tokens; None if the scorer gives none.
        """
        raise PlanError(f"selection {self.name} does not define select().")

    def count(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """[B] survivors, only if `adaptive`; the engine never lets them fall below `view.keep`."""
        raise PlanError(f"selection {self.name} is adaptive but does not define count().")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the name and every field."""
        return write_entry(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Selection:
        """Inverse of `to_dict`.

        Raises:
            UnknownNameError: if no selection has this name.
            PlanError: if a field is not one of its knobs.
        """
        return load_entry(SELECTIONS, data)


@dataclass(frozen=True)
class Merge:
    """Who stands for whom after a cut.

    Attributes:
        kept: [B, V] the tokens that stay, those included whose place a merged token takes.
        owner: [B, V] int64 index on the V axis of the token that each one is merged into. What stays owns itself; what
            owns itself and does not stay is dropped.
        weight: [B, V] weights of the mean, not negative; None for `view.size`.
        summed: the result is the weighted sum and not the weighted mean.
        near: [B, V, k] int64 index on the V axis of further tokens, k for each that stays, of which it takes a share,
            whoever owns them: so that one token may go into several. Rows of tokens that do not stay are not read. None
            if nobody takes shares.
        share: [B, V, k] fp32 their weights; 0 where a row has fewer than k, whose `near` is then the token itself.

    What a token takes by `near` is added to what it becomes by `owner`: share-weighted states before the merge, never
    divided by anything. It moves no books. Who stands for a token, its place, position and size go by `owner` alone,
    so that the sizes of what stays still add up to the number of original tokens.
    """

    kept: Tensor
    owner: Tensor
    weight: Tensor | None = None
    summed: bool = False
    near: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True)
class Remainder:
    """What happens to tokens that are not selected: a frozen dataclass under `@REMAINDERS.register("name")`.

    A token made of the rest takes the place and the position of one that leaves, and counts among the survivors.

    Attributes:
        name: registry key.
        summary: one line for listings, with the source.
        merges: something of the rest stays.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    merges: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        """It works only on a scorer that scores."""
        return False

    def places(self, view: TokenView) -> Tensor:
        """[B] of the `view.keep` survivors how many are made of the rest; the selection chooses the others.

        Not negative, never more than `view.keep`, and 0 where nothing leaves.
        """
        return torch.zeros_like(view.keep)

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """Give the rest away. Only called if `merges`.

        Args:
            view: what was there before the cut.
            selected: [B, V] what the selection chose, `view.keep - places` tokens a sample.
            scores: as for `Selection.select`.
        """
        raise PlanError(f"remainder {self.name} does not define merge().")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the name and every field."""
        return write_entry(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Remainder:
        """Inverse of `to_dict`.

        Raises:
            UnknownNameError: if no remainder has this name.
            PlanError: if a field is not one of its knobs.
        """
        return load_entry(REMAINDERS, data)


SELECTIONS: Registry[Selection] = Registry("selection", "vtprune.selections")
REMAINDERS: Registry[Remainder] = Registry("remainder", "vtprune.remainders")
