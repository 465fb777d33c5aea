"""What a prefill costs, counted: FLOPs (2 x multiply-accumulates, text and attention included) and KV bytes.

The counts follow what is executed: attention is counted as the full rows x keys product, as
`torch.utils.flop_counter` does, so that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.budget import Basis, Geometry
from vtprune.plan import Plan

__all__ = ["kv_bytes", "plan_cost", "prefill_flops", "vision_flops"]


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


def vision_flops(geometry: Geometry, lengths: Sequence[int], patches: int) -> int:
    """FLOPs of the vision tower and the projector for one image; 0 if the family knows no tower.

    Args:
        geometry: the model's shape.
        lengths: tokens (CLS included) that enter each tower block.
        patches: patches of the image; the projector runs on what leaves the feature block.
    """
    tower = geometry.vision
    if tower is None:
        return 0
    total = 2 * patches * tower.patch_dim * tower.hidden
    for n in lengths:
        total += 2 * n * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate) + 4 * n * n * tower.hidden
    survivors = lengths[-1] - int(tower.has_cls)
    into, middle, out = tower.projector
    return total + 2 * survivors * (into * middle + middle * out)


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
    """Cost of `plan` in the unit of `basis`: average tokens a layer, final tokens, or share of prefill FLOPs."""
    tokens = plan.tokens_per_layer(geometry.entering, geometry.visual_tokens)
    if basis == "average":
        return sum(tokens) / len(tokens)
    if basis == "final":
        return float(tokens[-1])
    text = geometry.text_tokens
    full = prefill_flops(geometry, [text + geometry.visual_tokens] * geometry.layers)
    return prefill_flops(geometry, [text + t for t in tokens]) / full
