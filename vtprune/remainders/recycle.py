"""Some of the rest comes back as a few averaged tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import REMAINDERS, Merge, Remainder, own_index, top_k_mask
from vtprune.similarity import nearest_target, unit_states
from vtprune.views import TokenView

__all__ = ["Recycle", "density_peaks"]


@REMAINDERS.register("recycle")
@dataclass(frozen=True)
class Recycle(Remainder):
    """The best part of the rest is clustered, and each cluster's mean survives (SparseVLM, arXiv 2410.04417).

    Of n tokens that are not selected the best floor(share n) by score go into floor(share n / group) + 1 clusters by
    density peaks (`density_peaks`), and each of those goes into the centre with the highest cosine. The rest of the
    rest is dropped. The means count among the survivors, so that `keep` stays what was asked (SparseVLM adds them to
    it), and take the places and positions of their centres.

    Attributes:
        share: of the rest that comes back, in (0, 1]. SparseVLM's 0.3.
        group: tokens to a cluster, >= 1. SparseVLM's 10.
        neighbours: k of the density, >= 1; None is the number of clusters, as SparseVLM's code has it.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "recycle"
    summary: ClassVar[str] = "the best of it is clustered into a few survivors (arXiv 2410.04417)"

    share: float = 0.3
    group: int = 10
    neighbours: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0.0 < self.share <= 1.0:
            raise PlanError(f"recycle share must be a number in (0, 1], got {self.share!r}. The paper uses 0.3.")
        for knob, value in (("group", self.group), ("neighbours", self.neighbours)):
            optional = knob == "neighbours" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise PlanError(f"recycle {knob} must be an int >= 1, got {value!r}.")

    @property
    def needs_scores(self) -> bool:
        """See `Remainder.needs_scores`."""
        return True

    def clusters(self, keep: int, alive: int) -> int:
        """Clusters if `keep` of `alive` tokens survive, clusters included; at least one token stays as it is."""
        if keep >= alive or keep < 2:
            return 0
        found = 0
        # more clusters leave more unselected, which may make one cluster more
        for _ in range(keep):
            more = min(keep - 1, self._clustered(keep - found, alive) // self.group + 1)
            if more == found:
                break
            found = more
        return found

    def _clustered(self, selected: int, alive: int) -> int:
        return max(1, math.floor(self.share * (alive - selected)))

    def places(self, view: TokenView) -> Tensor:
        """[B] clusters."""
        alive = view.valid.sum(1).tolist()
        counts = [self.clusters(k, n) for k, n in zip(view.keep.tolist(), alive, strict=True)]
        return torch.tensor(counts, device=view.keep.device, dtype=view.keep.dtype)

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """See `Remainder.merge`."""
        rest = view.valid & ~selected
        own = own_index(selected)
        clusters = self.places(view)
        counts = selected.sum(1).tolist()
        sizes = [
            max(c, self._clustered(n, a)) if c else 0
            for c, n, a in zip(clusters.tolist(), counts, view.valid.sum(1).tolist(), strict=True)
        ]
        ranked = -own.float() if scores is None else scores
        back = top_k_mask(ranked, torch.tensor(sizes, device=rest.device), rest)
        states = unit_states(view.hidden, view.valid)
        centre = torch.zeros_like(rest)
        for b, count in enumerate(clusters.tolist()):
            if count:
                mine = back[b].nonzero()[:, 0]
                k = self.neighbours or count
                centre[b, mine[density_peaks(view.hidden[b, mine].float(), count, k)]] = True
        owner = nearest_target(states, centre)
        return Merge(selected | centre, owner.where(back & ~centre, own))


def density_peaks(points: Tensor, clusters: int, neighbours: int) -> Tensor:
    """Centres by density peaks with k nearest neighbours (DPC-KNN).

    With distances d_ij = |x_i - x_j| / sqrt(D), the density of a point is rho_i = exp(-mean of d_ij^2 over its k
    nearest points), delta_i its distance to the nearest point of higher density (the densest: to the farthest point),
    and the centres are those with the largest rho_i delta_i. Of points of equal density the earlier is the denser.

    Args:
        points: [n, D].
        clusters: centres, in [1, n].
        neighbours: k >= 1, at most n - 1 of which exist.

    Returns:
        [clusters] int64 indices, increasing.
    """
    number, width = points.shape
    if clusters >= number:
        return torch.arange(number, device=points.device)
    distance = torch.cdist(points.double(), points.double()) / math.sqrt(width)
    distance = (distance * 2**20).round() * 2.0**-20
    other = distance.clone().fill_diagonal_(float("inf"))
    near = other.topk(min(neighbours, number - 1), largest=False).values
    density = (-near.square().mean(1)).exp()
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(number, device=points.device))
    denser = rank[None] < rank[:, None]
    delta = distance.masked_fill(~denser, float("inf")).amin(1)
    delta = delta.where(denser.any(1), distance.amax(1))
    return (density * delta).argsort(descending=True, stable=True)[:clusters].sort().values
