"""FLOPs of each row in the three units that papers of this field call FLOPs, and how they are written.

The same prefill of LLaVA-1.5-7B is published as 3.8 T, 7.6 T and 8.8 T: multiply-accumulates of the image tokens alone
(TransPrune, FastV), twice that (YOPO), and 2 x multiply-accumulates with the text (ours, FlowCut). Shares of unpruned
differ less, but are not the same either.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vtprune.cost import image_flops, image_macs
from vtprune.eval.rows import UNPRUNED_ROW, FlopCounts, Row
from vtprune.plan import Plan

if TYPE_CHECKING:
    from vtprune.budget import Geometry
    from vtprune.eval.cell import Answers

__all__ = ["CONVENTIONS", "count_flops", "flop_texts", "flop_unit"]

CONVENTIONS = ("image MACs", "image FLOPs", "prefill FLOPs")
"""Titles of the three units, in the order of the fields of `FlopCounts`."""

_UNITS = {"T": 1e12, "G": 1e9, "M": 1e6}


def count_flops(rows: Sequence[Row], answers: Mapping[str, Answers]) -> None:
    """Fill `row.flop_counts` of every row that ran, from the tokens that entered each layer, question by question.

    Args:
        rows: of one sweep. Nothing is counted if no answers know the model's shape.
        answers: by row name.
    """
    geometry = next((found.geometry for found in answers.values() if found.geometry is not None), None)
    if geometry is None:
        return
    full = next((a.totals.flops_full / a.totals.questions for a in answers.values() if a.totals.flops_full), None)
    for row in rows:
        if row.status == "ok" and row.name in answers:
            row.flop_counts = _counts(row, answers[row.name], geometry, full)


def _counts(row: Row, found: Answers, geometry: Geometry, full: float | None) -> FlopCounts | None:
    plan = Plan() if row.plan is None or row.method == UNPRUNED_ROW else Plan.from_dict(row.plan)
    # the plan is the one for a prompt of one usual image; its restarts see the same share of other prompts
    usual = max(geometry.entering)
    restarts = [(layers, entering / usual) for layers, entering in plan.passes((usual,) * geometry.layers, usual)]

    # questions of one image size and budget have the same lengths: each is counted once
    @functools.cache
    def price(visual: int, tokens: tuple[int, ...]) -> tuple[int, int]:
        lengths = [*tokens]
        for layers, share in restarts:
            lengths += [round(share * visual)] * layers
        return image_macs(geometry, lengths), image_flops(geometry, lengths)

    prices = []
    for sample in (sample for samples in found.samples.values() for sample in samples):
        visual = sample.counts.get("visual_tokens")
        if visual is None:
            return None
        tokens = sample.counts.get("tokens_per_layer") or [visual] * geometry.layers
        prices.append(price(int(visual), tuple(tokens)))
    if not prices:
        return None
    macs, flops = (sum(each) / len(prices) for each in zip(*prices, strict=True))
    totals = found.totals
    return FlopCounts(macs, flops, totals.flops / totals.questions if totals.flops_full else full)


def flop_unit(rows: Sequence[Row]) -> str:
    """`T`, `G` or `M`: the largest unit that leaves the most expensive row at least one."""
    most = max((row.flop_counts.image_macs for row in rows if row.flop_counts is not None), default=0.0)
    return next((name for name, size in _UNITS.items() if most >= size), "M")


def flop_texts(row: Row, unit: str) -> list[str]:
    """The three counts of a row in `unit`, `-` where there is none."""
    counts = row.flop_counts
    found = (None,) * len(CONVENTIONS) if counts is None else (counts.image_macs, counts.image_flops, counts.prefill)
    return ["-" if value is None else f"{value / _UNITS[unit]:.4g}" for value in found]
