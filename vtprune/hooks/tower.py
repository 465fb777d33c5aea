"""One run of a vision tower that is cut.

Tokens leave as whole cells: all patches that the host merges into one token, or none. An image (or video) keeps what
the plan says of its own tokens, dealt to its crops (or frames) in proportion. Patches that no token is made of, such as
the padding that LLaVA-NeXT cuts off later, leave at the first cut.

Axes: U units (images, crops, frames), M rows of a unit, V cells still alive, c patches of a cell, S projector rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from vtprune.budget import Geometry
from vtprune.cells import split_in_proportion
from vtprune.contract import AttentionView, Scorer
from vtprune.cost import vision_flops
from vtprune.errors import BudgetError, HostContractError, InputError
from vtprune.hooks.alive import Alive, Cut, make_cut, merge_states, observe_all
from vtprune.hooks.call import check_per_token
from vtprune.hooks.departures import Departures
from vtprune.hooks.key_bias import KeyBias
from vtprune.hooks.tower_rows import TowerRows
from vtprune.hooks.tower_scores import StageScores, TowerScores
from vtprune.hooks.units import Medium, Tower
from vtprune.plan import Stage

__all__ = ["TowerCall"]


class TowerCall:
    """State of one run.

    Raises:
        InputError: if the tower cannot be cut on one of the images.
        BudgetError: if an image must keep more tokens than the budget gives it.
    """

    def __init__(
        self,
        geometry: Geometry,
        tower: Tower,
        media: Sequence[Medium],
        plans: Sequence[Sequence[Stage]],
        *,
        want_scores: bool,
    ) -> None:
        """`plans` holds the tower's stages for each of `media`; they differ in counts only."""
        mixed = next((medium.mixed for medium in media if medium.mixed), "")
        if mixed:
            raise InputError(mixed)
        self._geometry, self._tower = geometry, tower
        self._units = [unit for medium in media for unit in medium.units]
        self._last = -1 if geometry.vision is None else geometry.vision.feature_block
        self._has_cls = geometry.vision is not None and geometry.vision.has_cls
        self._stages = {stage.site.index: (ordinal, stage) for ordinal, stage in enumerate(plans[0], start=1)}
        # survivors of each unit, by ordinal
        self._targets = {
            ordinal: [n for medium, plan in zip(media, plans, strict=True) for n in _deal(medium, plan[ordinal - 1])]
            for ordinal, _ in self._stages.values()
        }
        self._cells = Alive.all_of([unit.cells for unit in self._units], torch.device("cpu"))
        self._rows: TowerRows | None = None
        self._departures = Departures(self._units, torch.device("cpu"))
        self.scores = TowerScores(self._departures.total) if want_scores else None
        self._mask: Any = None
        self._bias = KeyBias()
        self._weighs = False
        self._laid_out: tuple[int, ...] = ()
        self._read: list[tuple[Tensor, Tensor, Tensor]] = []
        # what was executed: rows and query-key products of each block, rows of the projector and its copies
        self._lengths: list[int] = []
        self._pairs: list[int] = []
        self._projected = 0

    def _start(self, hidden: Tensor) -> TowerRows:
        if self._rows is not None:
            raise HostContractError(
                "the vision tower ran twice for one set of images, which vtprune does not know. Please report it with "
                "your transformers version."
            )
        self._rows = rows = TowerRows(self._units, int(self._has_cls), self._tower.packing, hidden.device)
        rows.check(hidden)
        self._cells = Alive.all_of(self._cells.counts, hidden.device)
        self._departures = Departures(self._units, hidden.device)
        return rows

    def _follow(self, states: Tensor) -> None:
        """Bring the books to the device of these states: blocks of one tower may lie on several."""
        device = states.device
        if self._rows is not None and self._cells.original.device != device:
            self._rows.to(device)
            self._cells = self._cells.to(device)
            self._departures.to(device)

    # blocks

    def block(self, index: int, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What tower block `index` runs on, its states first; None leaves it as the host has it."""
        rows = self._rows if index else self._start(hidden)
        if rows is None:
            return None
        # a tower may go on behind the block that is read: nobody sees what it does there
        cut = self._stages.get(index - 1) if index <= self._last else None
        if cut is not None:
            self._follow(hidden)
            check_per_token(named, hidden.shape[-2], f"tower block {index}")
            hidden = self._cut(*cut, hidden, rows)
        if rows.pruned:
            rest, named = rows.arguments(rest, named)
        self._lengths.append(rows.total)
        self._pairs.append(rows.pairs(named))
        return ((hidden, *rest), named) if rows.pruned else None

    def attention(self, states: Tensor, named: dict[str, Any]) -> dict[str, Any] | None:
        """The named arguments of a block's attention to `states` where a unit is a row of a batch; None leaves them."""
        if self._rows is None or not self._rows.pruned or self._tower.packing != "padded":
            return None
        mask = self._mask
        return {**named, "attention_mask": mask if mask is None else mask.to(states.device)}

    def _decide(self, ordinal: int, stage: Stage, states: Tensor) -> Cut | None:
        """Cut the cells, whose states are [U, V, W], in the books; None if all stay."""
        cells = self._cells
        keep = [min(target, now) for target, now in zip(self._targets[ordinal], cells.counts, strict=True)]
        if keep == cells.counts:
            return None
        grids = [[unit.grid] for unit in self._units]
        texts = ((),) * len(keep)
        cut = make_cut(stage, cells, states, keep, None, grids, texts, None, self.scores is not None)
        if cut.alive.counts == cells.counts:
            return None
        self._departures.note(ordinal, cells, cut.alive, None if cut.merge is None else cut.merge.owner)
        if self.scores is not None and self._departures.kept is not None:
            order = self._departures.rows_of(cells).argsort()
            values = None if cut.scores is None else cut.scores[cells.valid][order]
            scored = self._departures.rows_of(cells)[order]
            self.scores.stages[ordinal] = StageScores(scored, values, self._departures.kept)
        self._cells = cut.alive
        return cut

    def _cut(self, ordinal: int, stage: Stage, hidden: Tensor, rows: TowerRows) -> Tensor:
        cells = self._cells
        cut = self._decide(ordinal, stage, rows.states(hidden, cells))
        if cut is None:
            return hidden
        if cut.merge is not None:
            hidden = rows.merge(cells, hidden, cut.merge)
        hidden = rows.keep(self._cells, hidden)
        self._weighs = self._weighs or stage.scorer.weighs_sizes
        if self._weighs:
            self._bias.set(rows, self._cells)
        real = rows.real()
        if real is not None and self._tower.packing == "padded":
            config: Any = self._tower.module.config
            self._mask = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=real)
        else:
            self._mask = None
        return hidden

    def observe(
        self,
        block: int,
        scorers: Sequence[Scorer],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Tensor | None:
        """Show a block's attention (see `Observer`) to the scorers that asked for it; what is added to its logits."""
        rows = self._rows
        if rows is None:
            return None
        self._follow(query)
        bias = self._bias.of(key, sum(part[0].shape[2] for part in self._read))
        if self._tower.packing != "padded":
            # backends without variable lengths are called once a segment
            self._read.append((query, key, value))
            if sum(part[0].shape[2] for part in self._read) < rows.total:
                return bias
            query, key, value = (rows.spread(torch.cat(parts, 2)) for parts in zip(*self._read, strict=True))
            self._read.clear()
        real = rows.real()
        if self._has_cls:
            asked, values = query[:, :, :1], value[:, :, :1]
        else:
            weight = torch.ones_like(rows.rows.original, dtype=torch.bool) if real is None else real
            weight = (weight / weight.sum(1, keepdim=True)).to(query.dtype)[:, None, None]
            asked, values = weight @ query, weight @ value
        view = AttentionView(
            block=block,
            query=asked,
            key=key,
            value=value,
            scaling=scaling,
            softcap=softcap,
            real=real,
            column=rows.columns(self._cells),
            valid=rows.patches(self._cells.valid),
            query_value=values,
            has_cls=self._has_cls,
            every_query=query,
        )
        observe_all(scorers, view, self._cells, rows.cell)
        return bias

    # after the blocks

    def laid_out(self, states: Tensor) -> Tensor:
        """The tower's output with a row for every patch again, zeros where one left."""
        self._follow(states)
        return states if self._rows is None or not self._rows.pruned else self._rows.full(states)

    def after_block(self, index: int, hidden: Tensor) -> Tensor | None:
        """[R, D] what block `index` gives -> of the patches that are left, where the projector gets just these."""
        cut = self._stages.get(index) if index == self._last else None
        if self._rows is None or cut is None:
            return None
        self._follow(hidden)
        return self._cut(*cut, hidden, self._rows)

    def before_projector(self, states: Tensor) -> Tensor | None:
        """[..., W] rows of all visual tokens, S in all -> [K, W] of those that are left; None leaves them."""
        self._follow(states)
        cut = self._stages.get(self._last)
        if cut is not None:
            states = self._cut_rows(*cut, states)
        kept = self._departures.kept
        self._laid_out = tuple(states.shape[:-1])
        return None if kept is None else states.reshape(-1, states.shape[-1])[kept]

    def _cut_rows(self, ordinal: int, stage: Stage, states: Tensor) -> Tensor:
        """Cut between tower and projector: nobody computes on the cells but the projector, one row each."""
        cells, flat = self._cells, states.reshape(-1, states.shape[-1])
        rows = self._departures.rows_of(cells)
        place = torch.zeros_like(cells.original).masked_scatter(cells.valid, rows)
        mine = flat[place]
        cut = self._decide(ordinal, stage, mine)
        if cut is None or cut.merge is None:
            return states
        return flat.index_copy(0, rows, merge_states(mine, cut.merge, cells)[cells.valid]).view(states.shape)

    def after_projector(self, features: Tensor) -> Tensor | None:
        """[K, D] -> [..., D] with what left marked (see `departures`); None leaves them."""
        self._follow(features)
        self._projected += features.numel() // features.shape[-1]
        if self._departures.kept is None:
            return None
        full = self._departures.scatter(features, marked=True)
        return full.view(*self._laid_out, -1) if self._laid_out else full

    def after_tap(self, features: Tensor) -> Tensor:
        """[K, D] features of an earlier block -> [S, D]."""
        self._follow(features)
        self._projected += len(features)
        return self._departures.scatter(features)

    def flops(self) -> int:
        """FLOPs of the tower and of what follows it up to the decoder, as executed."""
        patches = sum(unit.patches for unit in self._units)
        return vision_flops(
            self._geometry,
            self._lengths,
            patches,
            pairs=self._pairs,
            projected=self._projected,
            merged=self._departures.total,
        )


def _deal(medium: Medium, stage: Stage) -> list[int]:
    """How many cells of each unit of `medium` survive `stage`."""
    wanted = stage.count(medium.tokens) - medium.others
    if stage.adaptive:
        # the fewest that may stay; the scorer decides
        wanted = max(wanted, 1)
    if wanted < 1 <= medium.others:
        raise BudgetError(
            f"keep={stage.keep} leaves {wanted + medium.others} of an image's {medium.tokens} tokens at {stage.site}, "
            f"but its {medium.others} newline or CLS tokens are made of no patches and stay. Keep more than that, or "
            "use a method that cuts at 'input' or later.",
            floor=medium.others + 1,
        )
    return split_in_proportion(wanted, [unit.cells for unit in medium.units])
