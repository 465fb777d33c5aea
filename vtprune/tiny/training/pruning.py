"""Small stand-alone pruning rules for the model card's tables (the library's own methods live in vtprune.scorers).

All rules return ascending indices [B, V] of the visual tokens to keep; kept tokens keep their positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from vtprune.tiny.training.decoder import Packed
from vtprune.tiny.training.packing import Batch
from vtprune.tiny.training.vlms import TokenGrid, Vlm
from vtprune.tiny.training.vlms.base import HEADS, KEY_VALUE_HEADS


def top(values: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest of [B, N] values, ascending."""
    return values.topk(keep, -1).indices.sort(-1).values


def random_rule(grid: TokenGrid, rows: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    """Uniformly drawn tokens."""
    return top(torch.rand(rows, grid.tokens, generator=generator), keep)


def grid_rule(grid: TokenGrid, rows: int, keep: int) -> torch.Tensor:
    """A regular grid of at most `keep` tokens, as square as it goes; a chequerboard for half of them."""
    side = grid.side
    if keep == grid.tokens // 2:
        places = [place for place in range(grid.tokens) if (place // side + place % side) % 2 == side % 2]
        return torch.tensor(places).expand(rows, -1)
    shapes = [(down, across) for down in range(1, side + 1) for across in range(1, side + 1) if down * across <= keep]
    down, across = max(shapes, key=lambda shape: 2 * shape[0] * shape[1] - abs(shape[0] - shape[1]))
    lines = [int((line + 0.5) * side / down) for line in range(down)]
    columns = [int((column + 0.5) * side / across) for column in range(across)]
    return torch.tensor([line * side + column for line in lines for column in columns]).expand(rows, -1)


def max_min_rule(visual: torch.Tensor, keep: int) -> torch.Tensor:
    """Farthest-point choice by cosine distance of the projected tokens [B, N, D], as DivPrune does."""
    unit = functional.normalize(visual, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    rows = torch.arange(len(visual))
    far = 9.0
    newest = (distance + far * torch.eye(visual.shape[1])).amin(-1).argmax(-1)
    nearest = torch.full(distance.shape[:2], far)
    chosen = []
    for _ in range(keep):
        chosen.append(newest)
        nearest = torch.minimum(nearest, distance[rows, newest])
        nearest[rows, newest] = -1
        newest = nearest.argmax(-1)
    return torch.stack(chosen, 1).sort(1).values


def prompt_attention(vlm: Vlm, layer: int, packed: Packed, last: torch.Tensor) -> torch.Tensor:
    """Attention [B, V] that the last prompt token (text position `last` [B]) pays in decoder layer `layer`."""
    query, key = vlm.heads(layer, packed.hidden, packed.positions, HEADS, KEY_VALUE_HEADS)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    rows, place = torch.arange(len(query)), packed.prefix + last
    scores = torch.einsum("bhd,bhsd->bhs", query[rows, :, place], key) * query.shape[-1] ** -0.5
    weights = (scores + packed.mask[rows, 0, place][:, None]).softmax(-1).mean(1)
    return weights[:, packed.before : packed.prefix]


def oracle_values(batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """[B, N]: tokens of the asked objects first (their centres before all), then random; one question per row."""
    owner, is_center = torch.from_numpy(batch.labels[:, 3]), torch.from_numpy(batch.labels[:, 4])
    bits = np.zeros(len(owner), np.int64)
    for row, _, objects, _, _ in batch.reads.tolist():
        bits[row] |= objects
    asked = (owner >= 0) & ((torch.from_numpy(bits)[:, None] >> owner.clamp(min=0)) & 1 > 0)
    return noise + 2.0 * asked + 2.0 * (asked & (is_center > 0))
