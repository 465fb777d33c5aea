"""From the books of a call to its Report."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.budget import Geometry
from vtprune.cost import kv_bytes, prefill_flops, vision_flops
from vtprune.errors import InputError
from vtprune.hooks.families.base import Prompt
from vtprune.hooks.prefill import Prefill
from vtprune.hooks.tower import TowerRun
from vtprune.report import Report

__all__ = ["real_positions", "report_full", "report_pruned"]


def real_positions(prompt: Prompt) -> Tensor:
    """[B, N] True where this call's position is not padding."""
    visual, mask = prompt.visual, prompt.attention_mask
    if visual is None:
        raise InputError("this call has no image placeholders.")
    if mask is None:
        return torch.ones_like(visual)
    return mask[:, -visual.shape[1] :].bool()


def _vision(geometry: Geometry, run: TowerRun | None) -> tuple[int, int]:
    if run is None or geometry.vision is None:
        return 0, 0
    patches = geometry.vision.patches
    rows = [patches + int(geometry.vision.has_cls)] * len(run.lengths)
    full = vision_flops(geometry, rows, patches)
    return run.images * vision_flops(geometry, run.lengths, patches), run.images * full


def report_full(geometry: Geometry, prompt: Prompt, run: TowerRun | None, itemsize: int) -> Report:
    """Report of a prompt that was run unpruned."""
    visual = prompt.visual
    if visual is None:
        raise InputError("this call has no prompt.")
    batch, length = visual.shape
    real = [length] * batch if prompt.attention_mask is None else real_positions(prompt).sum(1).tolist()
    lengths = [length] * geometry.layers
    flops, cache = batch * prefill_flops(geometry, lengths), batch * kv_bytes(geometry, lengths, itemsize)
    part, full = _vision(geometry, run)
    return Report(
        visual_tokens=prompt.counts,
        text_tokens=tuple(r - v for r, v in zip(real, prompt.counts, strict=True)),
        tokens_per_layer=tuple((n,) * geometry.layers for n in prompt.counts),
        kept=(),
        flops=flops,
        flops_full=flops,
        vision_flops=part,
        vision_flops_full=full,
        kv_bytes=cache,
        kv_bytes_full=cache,
        layout=prompt.layout(real_positions(prompt)),
    )


def report_pruned(geometry: Geometry, call: Prefill, run: TowerRun | None, itemsize: int) -> Report:
    """Report of a prefill that pruned."""
    record, layers = call.record(), range(geometry.layers)

    def width(layer: int) -> tuple[int, int, list[int]]:
        return [w for w in call.widths if w[0] <= layer][-1]

    rows = [width(i)[1] for i in layers]
    held = [record.group_of(i).length for i in layers]
    past = [h - n for h, n in zip(held, rows, strict=True)]
    whole = [call.length] * geometry.layers
    part, full = _vision(geometry, run)
    return Report(
        visual_tokens=call.layout.counts,
        text_tokens=tuple(call.text_counts),
        tokens_per_layer=tuple(tuple(width(i)[2][b] for i in layers) for b in range(call.batch)),
        kept=tuple(call.kept),
        flops=call.batch * prefill_flops(geometry, rows, past),
        flops_full=call.batch * prefill_flops(geometry, whole, [call.past] * geometry.layers),
        vision_flops=part,
        vision_flops_full=full,
        kv_bytes=call.batch * kv_bytes(geometry, held, itemsize),
        kv_bytes_full=call.batch * kv_bytes(geometry, [call.past + call.length] * geometry.layers, itemsize),
        layout=call.layout,
    )
