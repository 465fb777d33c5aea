"""What scorers see of the decoder layers of a prefill.

Axes: B samples, M physical rows that are left, V visual tokens still alive, R rows that ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune.contract import AttentionView, Queries, TextView, TransitionView
from vtprune.hooks.alive import Alive
from vtprune.hooks.cache import Group
from vtprune.hooks.families.base import Prompt
from vtprune.hooks.masks import Masks
from vtprune.hooks.rows import Rows
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.layout import Layout

__all__ = ["Books", "Seen", "instruction_rows", "text_keys", "text_view"]


@dataclass(frozen=True)
class Seen:
    """What the attention of a decoder layer computes with: see `Observer`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None


@dataclass(frozen=True)
class Books:
    """Which tokens are left in a prefill, on the device of the layer that is watched."""

    rows: Rows
    alive: Alive
    layout: Layout

    @classmethod
    def on(cls, device: torch.device, rows: Rows, alive: Alive, layout: Layout) -> Books:
        """Bring them there."""
        return cls(rows.to(device), alive.to(device), layout.to(device))

    @property
    def column(self) -> Tensor:
        """[B, V] row of each alive visual token."""
        visual = self.layout.position.gather(1, self.alive.original)
        return self.rows.row_of(visual, self.layout.real.shape[1])

    def attention(self, block: int, seen: Seen, queries: Queries | None, group: Group, masks: Masks) -> AttentionView:
        """The view of a layer's attention for a scorer that reads `queries`."""
        past, keys, rows = seen.key.shape[2] - seen.query.shape[2], seen.key.shape[2], self.rows
        if queries in ("instruction", "all"):
            at, asking = instruction_rows(rows, self.layout) if queries == "instruction" else _in_order(rows.filled)
            real = masks.rows(block, group, rows.position.gather(1, at), keys)
        else:
            at, asking = rows.last()[:, None], None
            real = masks.row(block, group, rows.position.gather(1, at), keys)
        return AttentionView(
            block=block,
            query=_take(seen.query, at),
            key=seen.key,
            value=seen.value,
            scaling=seen.scaling,
            softcap=seen.softcap,
            real=real,
            column=self.column + past,
            valid=self.alive.valid,
            query_value=_take(seen.value, at + past),
            has_cls=False,
            rows=asking,
            first=past,
            every_query=seen.query,
        )

    def transition(
        self, layer: int, part: Literal["attention", "mlp"], before: Tensor, after: Tensor
    ) -> TransitionView:
        """The view of what a sublayer made of its rows."""
        return TransitionView(layer, part, before, after, self.rows.filled, self.column, self.alive.valid)


def instruction_rows(rows: Rows, layout: Layout) -> tuple[Tensor, Tensor]:
    """The tokens behind the last image of each sample; a prompt that ends with one is refused.

    Returns:
        [B, R] rows, and [B, R] False at padding.
    """
    return _in_order(rows.filled & _behind(rows, layout))


def text_view(hidden: Tensor, rows: Rows, text: Tensor, layout: Layout) -> TextView:
    """The text tokens that are left, on the device of their states.

    Args:
        hidden: [B, M, D] states of all rows.
        rows: what they hold.
        text: [B, N] positions of the call that hold text which is left.
        layout: of the prompt.
    """
    index, real = _in_order(rows.filled & text.gather(1, rows.position))
    behind = _behind(rows, layout).gather(1, index) & real
    index, real, behind = (t.to(hidden.device) for t in (index, real, behind))
    return TextView(keep_tokens([hidden], index)[0], real, behind)


def _behind(rows: Rows, layout: Layout) -> Tensor:
    """[B, M] True at rows behind the last image; all of them in a sample without one."""
    last = layout.position.masked_fill(~layout.valid, -1).amax(1, keepdim=True)
    return rows.position > last


def _in_order(marks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M] marks -> [B, R] the marked rows, padded at the end, and [B, R] False at that padding."""
    counts = marks.sum(1)
    width = int(counts.max())
    index = torch.argsort((~marks).to(torch.uint8), dim=1, stable=True)[:, :width]
    return index, torch.arange(width, device=marks.device) < counts[:, None]


def text_keys(prompt: Prompt, layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The ids of each sample's text tokens; () where only embeddings were passed."""
    ids, visual = prompt.input_ids, prompt.visual
    if ids is None or visual is None:
        return ((),) * layout.real.shape[0]
    text = layout.real & ~visual
    return tuple(tuple(row[keep].tolist()) for row, keep in zip(ids, text, strict=True))


def _take(states: Tensor, at: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, H, R, d] at rows [B, R]."""
    return states.gather(2, at[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
