"""From the books of a call to its Report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from vtprune.budget import Geometry
from vtprune.cost import kv_bytes, prefill_flops, projection_flops, vision_flops
from vtprune.errors import InputError
from vtprune.hooks.families.base import Prompt
from vtprune.hooks.prefill import Prefill
from vtprune.hooks.units import Medium, Tower
from vtprune.report import Report

__all__ = ["real_positions", "report_full", "report_pruned", "unpruned_tower"]


def real_positions(prompt: Prompt) -> Tensor:
    """[B, N] True where this call's position is not padding."""
    visual, mask = prompt.visual, prompt.attention_mask
    if visual is None:
        raise InputError("this call has no image placeholders.")
    if mask is None or isinstance(mask, dict) or mask.ndim != 2:
        return torch.ones_like(visual)
    return mask[:, -visual.shape[1] :].bool()


def unpruned_tower(geometry: Geometry, tower: Tower, media: Sequence[Medium]) -> int:
    """FLOPs of the tower, and of what follows it up to the decoder, on these images if nothing is dropped."""
    vision = geometry.vision
    if vision is None:
        return 0
    units = [unit for medium in media for unit in medium.units]
    lengths = [int(vision.has_cls) + unit.patches for unit in units]
    whole = sum(n * n for n in lengths)
    config: Any = tower.module.config
    if tower.packing == "mask" and not is_flash_attention_requested(config):
        # a mask hides products that are computed all the same
        whole = sum(lengths) ** 2
    windows = sum(n * n for unit in units for n in unit.windows)
    full = range(vision.blocks) if vision.full_blocks is None else vision.full_blocks
    outputs = sum(unit.outputs for unit in units)
    return vision_flops(
        geometry,
        [sum(lengths)] * vision.blocks,
        sum(unit.patches for unit in units),
        pairs=[whole if block in full else windows for block in range(vision.blocks)],
        projected=outputs * (1 + len(vision.taps)),
        merged=outputs,
    )


def _cached(geometry: Geometry, cache: Any) -> Geometry:
    """The geometry with the windows that the cache knows: one made without the model's config keeps every position."""
    knows = cache is None or any(cache.is_sliding)
    return geometry if knows else dataclasses.replace(geometry, windows=())


def report_full(geometry: Geometry, prompt: Prompt, vision: tuple[int, int], itemsize: int) -> Report:
    """Report of a prompt that was run unpruned; `vision` is the tower's FLOPs as run and unpruned."""
    visual, geometry = prompt.visual, _cached(geometry, prompt.cache)
    if visual is None:
        raise InputError("this call has no prompt.")
    batch, length = visual.shape
    real = [length] * batch if prompt.attention_mask is None else real_positions(prompt).sum(1).tolist()
    text = tuple(r - v for r, v in zip(real, prompt.counts, strict=True))
    lengths = [length] * geometry.layers
    flops, cache = batch * prefill_flops(geometry, lengths), batch * kv_bytes(geometry, lengths, itemsize)
    return Report(
        visual_tokens=prompt.counts,
        text_tokens=text,
        text_kept=text,
        tokens_per_layer=tuple((n,) * geometry.layers for n in prompt.counts),
        kept=(),
        flops=flops,
        flops_full=flops,
        vision_flops=vision[0],
        vision_flops_full=vision[1],
        kv_bytes=cache,
        kv_bytes_full=cache,
        layout=prompt.layout(real_positions(prompt)),
        notes=geometry.notes,
    )


def report_pruned(geometry: Geometry, call: Prefill, vision: tuple[int, int], itemsize: int) -> Report:
    """Report of a prefill that pruned; `vision` is the tower's FLOPs as run and unpruned."""
    geometry = _cached(geometry, call.prompt.cache)
    record, layers = call.record(), range(geometry.layers)

    def width(layer: int) -> tuple[int, int, list[int]]:
        return [w for w in call.widths if w[0] <= layer][-1]

    rows = [width(i)[1] for i in layers]
    held = [record.group_of(i).length for i in layers]
    past = [h - n for h, n in zip(held, rows, strict=True)]
    whole = [call.length] * geometry.layers
    return Report(
        visual_tokens=call.layout.counts,
        text_tokens=tuple(call.text_counts),
        text_kept=tuple(call.left.text_counts),
        tokens_per_layer=tuple(tuple(width(i)[2][b] for i in layers) for b in range(call.batch)),
        kept=tuple(call.left.kept),
        flops=call.batch * (prefill_flops(geometry, rows, past) + _asked_flops(geometry, call)),
        flops_full=call.batch * prefill_flops(geometry, whole, [call.past] * geometry.layers),
        vision_flops=vision[0],
        vision_flops_full=vision[1],
        kv_bytes=call.batch * kv_bytes(geometry, held, itemsize),
        kv_bytes_full=call.batch * kv_bytes(geometry, [call.past + call.length] * geometry.layers, itemsize),
        layout=call.layout,
        notes=geometry.notes,
        restarted=tuple(sum(k * alive[b] for k, _, alive in call.passes) for b in range(call.batch))
        if call.passes
        else (),
        # restarts come before layers, so the passes are the first that were asked
        asked=(*((k, rows) for k, rows, _ in call.passes), *((0, rows) for rows in call.asked[len(call.passes) :])),
    )


def _asked_flops(geometry: Geometry, call: Prefill) -> int:
    """FLOPs, a sample, of what ran only to be asked: the passes of restarts, and the projections of asked layers."""
    passes = sum(prefill_flops(geometry, [rows] * k, [call.past] * k) for k, rows, _ in call.passes)
    return passes + sum(projection_flops(geometry, rows) for rows in call.asked)
