"""Cuts inside the vision tower.

`generate` encodes the images before it calls the model, so a tower run knows its images but not the prompts they belong
to. What left is therefore written into the features themselves: the projector's output is scattered back to one row a
patch, and the row of a token that left is zero but for channel 0, which holds the ordinal (1, 2, ...) of the stage at
which it left. The rows travel with the features through beam expansion, caching and copies, and are dropped before the
decoder sees them.

Axes: B images, M rows of the shortened tower (CLS included), V patches still alive, N patches of a full image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from vtprune.budget import VisionGeometry
from vtprune.contract import AttentionView, Scorer
from vtprune.hooks.alive import Alive, cut_counts, make_cut, observe_all
from vtprune.hooks.call import check_per_token
from vtprune.hooks.families.base import Parts
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.plan import Stage

__all__ = ["TowerCall", "TowerRun", "read_departures"]


@dataclass(frozen=True)
class TowerRun:
    """What a finished tower run executed, for the report.

    Attributes:
        images: images encoded.
        lengths: rows (CLS included) that entered each block, the projector's input last.
    """

    images: int
    lengths: tuple[int, ...]


def read_departures(features: Tensor, valid: Tensor) -> Tensor:
    """[B, V, D] visual embeddings -> [B, V] ordinal of the tower stage at which each token left, 0 for survivors."""
    gone = (features[..., 1:] == 0).all(-1) & valid
    return torch.where(gone, features[..., 0].float().round().long(), 0)


class TowerCall:
    """State of one run of the vision tower."""

    def __init__(self, parts: Parts, vision: VisionGeometry, stages: Sequence[Stage], grid: tuple[int, int]) -> None:
        self.parts, self.vision, self.grid = parts, vision, grid
        self._stages = {stage.site.index: (ordinal, stage) for ordinal, stage in enumerate(stages, start=1)}
        self._alive: Alive | None = None
        self._departed: Tensor | None = None
        self._mask: Any = None
        self._lengths: list[int] = []

    def block(self, index: int, hidden: Tensor, rest: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        """What tower block `index` runs on; None leaves it as the host has it."""
        if self._alive is None:
            patches = hidden.shape[1] - int(self.vision.has_cls)
            self._alive = Alive.all_of([patches] * hidden.shape[0], hidden.device)
            self._departed = torch.zeros(hidden.shape[0], patches, dtype=torch.long, device=hidden.device)
        cut = self._stages.get(index - 1)
        if cut is not None:
            check_per_token(arguments, hidden.shape[1], f"tower block {index}")
            hidden = self._cut(*cut, hidden)
        self._lengths.append(hidden.shape[1])
        if cut is None and self._mask is None:
            return None
        # the host passes the mask by position; without padding it stays None
        return (hidden, self._mask if self._mask is not None else rest[0] if rest else None, *rest[1:]), arguments

    def _cut(self, ordinal: int, stage: Stage, hidden: Tensor) -> Tensor:
        alive, departed = self._alive, self._departed
        if alive is None or departed is None:
            return hidden
        keep = cut_counts(stage, [departed.shape[1]] * len(alive.counts), alive.counts)
        if keep == alive.counts:
            return hidden
        first = int(self.vision.has_cls)
        grids = [[self.grid]] * len(alive.counts)
        after = make_cut(stage, alive, hidden[:, first:], keep, None, grids, (), False)
        if after.alive.counts == alive.counts:
            return hidden
        survivors = torch.zeros_like(departed)
        survivors.scatter_add_(1, after.alive.original, after.alive.valid.long())
        self._departed = torch.where((departed == 0) & (survivors == 0), ordinal, departed)
        index = after.index + first
        if first:
            index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
        self._alive = after.alive
        hidden = keep_tokens([hidden], index)[0]
        counts = after.alive.counts
        if any(n != max(counts) for n in counts):
            self._mask = create_bidirectional_mask(
                config=self.parts.tower.config,  # type: ignore[union-attr, arg-type]
                inputs_embeds=hidden,
                attention_mask=self._real(),
            )
        else:
            self._mask = None
        return hidden

    def _real(self) -> Tensor:
        """[B, M] False at padding."""
        valid = self._alive.valid  # type: ignore[union-attr]
        if not self.vision.has_cls:
            return valid
        return torch.cat([torch.ones_like(valid[:, :1]), valid], 1)

    def observe(
        self,
        block: int,
        scorers: Sequence[Scorer],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Show a block's attention (see `Observer`) to the scorers that asked for it."""
        alive = self._alive
        if alive is None:
            return
        first = int(self.vision.has_cls)
        padded = any(n != alive.original.shape[1] for n in alive.counts)
        real = self._real()
        if first:
            rows, values = query[:, :, :1], value[:, :, :1]
        else:
            weight = (real / real.sum(1, keepdim=True)).to(query.dtype)[:, None, None]
            rows, values = weight @ query, weight @ value
        width = alive.original.shape[1]
        view = AttentionView(
            block=block,
            query=rows,
            key=key,
            value=value,
            scaling=scaling,
            softcap=softcap,
            real=real if padded else None,
            column=torch.arange(first, first + width, device=key.device).expand(len(alive.counts), -1),
            valid=alive.valid,
            query_value=values,
            has_cls=bool(first),
        )
        observe_all(scorers, view, alive)

    def features(self, projected: Tensor) -> Tensor:
        """[B, V, D] projector output -> [B, N, D] with the departed marked (see the module's docstring)."""
        alive, departed = self._alive, self._departed
        if alive is None or departed is None or bool((departed == 0).all()):
            return projected
        marks = projected.new_zeros(*departed.shape, projected.shape[-1])
        marks[..., 0] = departed.to(projected.dtype)
        # padding of the V axis is written to a spare row behind the last one
        spare = torch.cat([marks, marks[:, :1]], 1)
        index = alive.original.masked_fill(~alive.valid, departed.shape[1])
        return spare.scatter(1, index[..., None].expand_as(projected), projected)[:, :-1]

    def run(self) -> TowerRun:
        """What was executed."""
        return TowerRun(0 if self._departed is None else self._departed.shape[0], tuple(self._lengths))
