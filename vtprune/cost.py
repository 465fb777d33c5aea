"""What a prefill costs, counted: FLOPs (2 x multiply-accumulates, text and attention included) and KV bytes.

The counts follow what is executed: attention is counted as the full rows x keys product, as
`torch.utils.flop_counter` does, so that both agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vtprune.budget import Basis, Geometry
from vtprune.plan import Plan

__all__ = ["image_flops", "image_macs", "kv_bytes", "plan_cost", "prefill_flops", "projection_flops", "vision_flops"]


def prefill_flops(geometry: Geometry, lengths: Sequence[int], past: Sequence[int] | None = None) -> int:
    """FLOPs of the decoder (without the output head) for one sample.

    Args:
        geometry: the decoder's shape.
        lengths: tokens (text and visual) that enter each decoder layer.
        past: positions that each layer's cache has seen before, 0 if None.
    """
    width = geometry.heads * geometry.head_dim
    kv_width = geometry.kv_heads * geometry.head_dim
    linear = 2 * geometry.hidden * width + 2 * geometry.hidden * kv_width + 3 * geometry.hidden * geometry.intermediate
    total = 0
    for layer, n in enumerate(lengths):
        keys = n + (_held(geometry, layer, past[layer]) if past is not None else 0)
        total += 2 * n * linear + 4 * n * keys * width
    return total


def projection_flops(geometry: Geometry, tokens: int) -> int:
    """FLOPs of the queries, keys and values of one decoder layer, on which look-ahead scorers stop."""
    return 2 * tokens * geometry.hidden * (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim


def image_macs(geometry: Geometry, tokens_per_layer: Sequence[int]) -> int:
    """The count that FastV, PyramidDrop and TransPrune publish as "FLOPs": sum over layers of 4nd^2 + 2n^2d + 3ndm.

    Multiply-accumulates (not times two) of the image tokens alone, n in each layer, at width d and intermediate width
    m; text, grouped key heads and the tower are left out. For comparison with those papers only.
    """
    d, m = geometry.hidden, geometry.intermediate
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens_per_layer)


def image_flops(geometry: Geometry, tokens_per_layer: Sequence[int]) -> int:
    """The count that YOPO publishes as "FLOPs": twice `image_macs`. For comparison with that paper only."""
    return 2 * image_macs(geometry, tokens_per_layer)


def vision_flops(
    geometry: Geometry,
    lengths: Sequence[int],
    patches: int,
    *,
    pairs: Sequence[int] | None = None,
    projected: int | None = None,
    merged: int | None = None,
) -> int:
    """FLOPs of the vision tower and what follows it up to the decoder; 0 if the family knows no tower.

    Args:
        geometry: the model's shape.
        lengths: tokens (CLS included) that enter each tower block.
        patches: patches of the image.
        pairs: products of a query and a key in each block; None is the square of `lengths`, one image without windows.
        projected: rows that pass the projector and its copies; None is what leaves their blocks.
        merged: visual tokens that pass the merger; None is all of the image.
    """
    tower = geometry.vision
    if tower is None:
        return 0
    total = 2 * patches * tower.patch_dim * tower.hidden
    linear = 4 * tower.hidden**2 + tower.mlp_matrices * tower.hidden * tower.intermediate
    for n, products in zip(lengths, [n * n for n in lengths] if pairs is None else pairs, strict=True):
        total += 2 * n * linear + 4 * products * tower.hidden
    if projected is None:
        left = [lengths[block] - int(tower.has_cls) for block in (tower.feature_block, *tower.taps)]
        projected = sum(left) // tower.cell
    if merged is None:
        merged = patches // tower.cell
    return total + 2 * projected * _chain(tower.projector) + 2 * merged * _chain(tower.merger)


def _chain(widths: Sequence[int]) -> int:
    """Multiply-accumulates of one row through linear layers of these widths."""
    return sum(before * after for before, after in itertools.pairwise(widths))


def kv_bytes(geometry: Geometry, lengths: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values for one sample.

    Args:
        geometry: the decoder's shape.
        lengths: positions that each decoder layer's cache has seen.
        itemsize: bytes of one element.
    """
    each = 2 * geometry.kv_heads * geometry.head_dim * itemsize
    return sum(each * _held(geometry, layer, n) for layer, n in enumerate(lengths))


def _held(geometry: Geometry, layer: int, seen: int) -> int:
    """Positions that a layer's cache keeps of those it has seen: all, or those that the next token's window reaches."""
    window = geometry.windows[layer] if geometry.windows else None
    return seen if window is None else min(seen, window - 1)


def plan_cost(plan: Plan, geometry: Geometry, basis: Basis) -> float:
    """Cost of `plan` in the unit of `basis`: average tokens a layer, final tokens, or share of prefill FLOPs.

    Layers that a restart runs count once more.
    """
    total = geometry.visual_tokens
    tokens = plan.tokens_per_layer(geometry.entering, total)
    passes = plan.passes(geometry.entering, total)
    if basis == "average":
        return (sum(tokens) + sum(k * n for k, n in passes)) / len(tokens)
    if basis == "final":
        return float(tokens[-1])
    text = geometry.text_tokens
    full = prefill_flops(geometry, [text + total] * geometry.layers)
    asked = [*passes, *plan.looks_ahead(geometry.entering, total)]
    flops = prefill_flops(geometry, [text + t for t in tokens])
    flops += sum(prefill_flops(geometry, [text + n] * k) for k, n in passes)
    flops += sum(projection_flops(geometry, text + n) for _, n in asked)
    return flops / full
