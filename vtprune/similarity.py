"""Cosines of token states, compared in whole steps so that rounding decides nothing.

Sums of products come out differently in their last bits on another device, in another batch, or in another order. What
is compared here is rounded to steps of 2**-20 first: equal tokens (flat background) then tie exactly, and a tie can go
to the earlier token everywhere. Axes: B samples, V tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["STEP", "blocks_of_rows", "cosine_distance", "nearest_others", "nearest_target", "unit_states"]

STEP = 2.0**-20
# elements of one block of cosines
_BLOCK = 1 << 22


def unit_states(states: Tensor, valid: Tensor) -> Tensor:
    """[B, V, D] -> the same scaled to length 1, fp32; zero vectors and padding are 0."""
    return functional.normalize(states.detach().float().masked_fill(~valid[:, :, None], 0.0), dim=2)


def cosine_distance(cosine: Tensor) -> Tensor:
    """1 - cos in whole steps of 2**-20, at least 0; exact in fp32."""
    return ((1.0 - cosine) * 2**20).round().clamp(min=0.0)


def blocks_of_rows(batch: int, length: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers of rows, so many at a time that [batch, rows, width] stays small."""
    size = max(1, _BLOCK // max(1, batch * width))
    for start in range(0, length, size):
        yield torch.arange(start, min(start + size, length), device=device)


def nearest_target(states: Tensor, targets: Tensor) -> Tensor:
    """[B, V] int64: for each token the index on the V axis of the target with the highest cosine.

    Ties go to the earlier. Where a sample has no target a token's own index is given.
    Cost: O(V T D) for T targets, in blocks.

    Args:
        states: [B, V, D] unit vectors.
        targets: [B, V] bool.
    """
    batch, length = targets.shape
    own = torch.arange(length, device=targets.device).expand(batch, -1)
    counts = targets.sum(1)
    width = int(counts.max()) if batch else 0
    if width == 0:
        return own.clone()
    index = torch.argsort((~targets).to(torch.uint8), dim=1, stable=True)[:, :width]
    there = torch.arange(width, device=targets.device) < counts[:, None]
    others = states.gather(1, index[..., None].expand(-1, -1, states.shape[2])).transpose(1, 2)
    nearest = []
    for rows in blocks_of_rows(batch, length, width, targets.device):
        distance = cosine_distance(states[:, rows] @ others)
        nearest.append(distance.masked_fill(~there[:, None], float("inf")).argmin(2))
    found = index.gather(1, torch.cat(nearest, 1))
    return found.where(counts[:, None] > 0, own)


def nearest_others(states: Tensor, rows: Tensor, valid: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` other tokens with the highest cosine to each token of `rows`, nearest first, ties to the earlier.

    Cost: O(R V D) for R rows a sample, in blocks; no [V, V] matrix is kept.

    Args:
        states: [B, V, D] unit vectors.
        rows: [B, V] bool, the tokens that ask; not at padding.
        valid: [B, V] the tokens that may be found.
        number: k >= 1; fewer if a sample has no more tokens.

    Returns:
        [B, V, min(k, V)] int64 indices on the V axis, the token's own where nothing is found or nobody asks; and of the
        same shape whether something is found.
    """
    batch, length = valid.shape
    device, number = valid.device, min(number, length)
    own = torch.arange(length, device=device)[None, :, None].expand(batch, -1, number)
    width = int(rows.sum(1).max()) if batch else 0
    index = torch.argsort((~rows).to(torch.uint8), dim=1, stable=True)[:, :width]
    asks = rows.gather(1, index)
    place, nobody = torch.arange(length, device=device), 1 << 24
    found = []
    for part in blocks_of_rows(batch, width, length, device):
        mine = index[:, part]
        cosine = states.gather(1, mine[..., None].expand(-1, -1, states.shape[2])) @ states.transpose(1, 2)
        there = valid[:, None] & asks[:, part, None] & (place != mine[..., None])
        # distance and place in one whole number, so that no two are equal
        ranked = torch.where(there, cosine_distance(cosine).long(), nobody) * length + place
        found.append(ranked.topk(number, 2, largest=False).values)
    if not found:
        return own, torch.zeros(own.shape, dtype=torch.bool, device=device)
    best = torch.cat(found, 1)
    there = best < nobody * length
    at = index[..., None].expand(-1, -1, number)
    near = own.scatter(1, at, torch.where(there, best % length, at))
    return near, torch.zeros(own.shape, dtype=torch.bool, device=device).scatter(1, at, there)
