"""Small stand-alone pruning rules for the model card's tables (the library's own methods live in vtprune.scorers).

All rules return ascending indices [B, V] of the visual tokens to keep; kept tokens keep their positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from vtprune.tiny.training.decoder import Packed, pixels
from vtprune.tiny.training.packing import Batch
from vtprune.tiny.vocabulary import GRID, PREFIX, VISUAL_TOKENS


def top(values: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest of [B, N] values, ascending."""
    return values.topk(keep, -1).indices.sort(-1).values


def random_rule(rows: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    """Uniformly drawn tokens."""
    return top(torch.rand(rows, VISUAL_TOKENS, generator=generator), keep)


def grid_rule(rows: int, keep: int) -> torch.Tensor:
    """A regular grid of at most `keep` tokens, as square as it goes; a chequerboard for half of them."""
    if keep == VISUAL_TOKENS // 2:
        places = [place for place in range(VISUAL_TOKENS) if (place // GRID + place % GRID) % 2 == 0]
        return torch.tensor(places).expand(rows, -1)
    shapes = [(down, across) for down in range(1, GRID + 1) for across in range(1, GRID + 1) if down * across <= keep]
    down, across = max(shapes, key=lambda shape: 2 * shape[0] * shape[1] - abs(shape[0] - shape[1]))
    lines = [int((line + 0.5) * GRID / down) for line in range(down)]
    columns = [int((column + 0.5) * GRID / across) for column in range(across)]
    return torch.tensor([line * GRID + column for line in lines for column in columns]).expand(rows, -1)


def max_min_rule(visual: torch.Tensor, keep: int) -> torch.Tensor:
    """Farthest-point choice by cosine distance of the projected tokens [B, N, D], as DivPrune does."""
    unit = functional.normalize(visual, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    rows = torch.arange(len(visual))
    far = 9.0
    newest = (distance + far * torch.eye(VISUAL_TOKENS)).amin(-1).argmax(-1)
    nearest = torch.full(distance.shape[:2], far)
    chosen = []
    for _ in range(keep):
        chosen.append(newest)
        nearest = torch.minimum(nearest, distance[rows, newest])
        nearest[rows, newest] = -1
        newest = nearest.argmax(-1)
    return torch.stack(chosen, 1).sort(1).values


def class_attention(model: LlavaForConditionalGeneration, images: np.ndarray) -> torch.Tensor:
    """Attention of CLS to each patch in the last ViT layer, mean over heads, [B, N]."""
    output = model.model.vision_tower(pixels(images), output_attentions=True, return_dict=True)
    return output.attentions[-1][:, :, 0, 1:].mean(1)


def prompt_attention(
    model: LlavaForConditionalGeneration, layer: int, packed: Packed, last: torch.Tensor
) -> torch.Tensor:
    """Attention [B, N] that the last prompt token (text position `last` [B]) pays in decoder layer `layer`."""
    language = model.model.language_model
    block = language.layers[layer]
    attention = block.self_attn
    normed = block.input_layernorm(packed.hidden)
    size, length, _ = normed.shape
    shape = (size, length, -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    cosine, sine = (part[:, None] for part in language.rotary_emb(packed.hidden, packed.positions))
    query, key = (side * cosine + _rotate(side) * sine for side in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    rows, place = torch.arange(size), packed.prefix + last
    scores = torch.einsum("bhd,bhsd->bhs", query[rows, :, place], key) * attention.head_dim**-0.5
    weights = (scores + packed.mask[rows, 0, place][:, None]).softmax(-1).mean(1)
    return weights[:, len(PREFIX) : packed.prefix]


def _rotate(side: torch.Tensor) -> torch.Tensor:
    first, second = side.chunk(2, -1)
    return torch.cat([-second, first], -1)


def oracle_values(batch: Batch, noise: torch.Tensor) -> torch.Tensor:
    """[B, N]: tokens of the asked objects first (their centres before all), then random; one question per row."""
    owner, is_center = torch.from_numpy(batch.labels[:, 3]), torch.from_numpy(batch.labels[:, 4])
    bits = np.zeros(len(owner), np.int64)
    for row, _, objects, _, _ in batch.reads.tolist():
        bits[row] |= objects
    asked = (owner >= 0) & ((torch.from_numpy(bits)[:, None] >> owner.clamp(min=0)) & 1 > 0)
    return noise + 2.0 * asked + 2.0 * (asked & (is_center == 1))
