"""Proportional attention in a vision tower: log s is added to the logits of a key that stands for s tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.errors import UnsupportedModelError
from vtprune.hooks.alive import Alive
from vtprune.hooks.tower_rows import TowerRows
from vtprune.plan import Plan

__all__ = ["KeyBias", "weighed_blocks"]

_BACKENDS = ("sdpa", "eager")


def weighed_blocks(plan: Plan, last: int, config: Any) -> range:
    """The tower blocks that weigh keys: those behind the first cut that asks for it, up to block `last`.

    Raises:
        UnsupportedModelError: if the attention backend of `config` takes no mask.
    """
    first = min((s.site.index for s in plan.at("vision") if s.scorer.weighs_sizes), default=last)
    blocks = range(first + 1, last + 1)
    backend = config._attn_implementation
    if blocks and backend not in _BACKENDS:
        names = sorted({s.scorer.name for s in plan.at("vision") if s.scorer.weighs_sizes})
        raise UnsupportedModelError(
            f"{', '.join(names)} weighs the keys of the vision tower by how many tokens they stand for, which "
            f"attention {backend!r} cannot do. Load the model with attn_implementation set to "
            f"{' or '.join(_BACKENDS)}, or set proportional=False."
        )
    return blocks


class KeyBias:
    """What is added to the logits of each row of a tower, once a cut has merged cells."""

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._packed = False

    def set(self, rows: TowerRows, cells: Alive) -> None:
        """Note what the rows that are left stand for: a patch for as many as its cell has taken in, others for one."""
        if cells.size is None:
            return
        now = rows.rows.original
        # padding of the cells goes to a spare row behind the last one
        column = rows.columns(cells).masked_fill(~rows.patches(cells.valid), now.shape[1])
        logs = rows.patches(cells.size.log())
        table = torch.zeros(now.shape[0], now.shape[1] + 1, device=now.device).scatter(1, column, logs)[:, :-1]
        self._packed = rows.packed
        self._table = table[rows.rows.valid][None] if rows.packed else table

    def of(self, key: Tensor, start: int) -> Tensor | None:
        """[U, 1, 1, N] for keys [U, H, N, d], of which the first is row `start` of a packed tower; None for nothing."""
        if self._table is None:
            return None
        table = self._table[:, start : start + key.shape[2]] if self._packed else self._table
        return table[:, None, None].to(key)
