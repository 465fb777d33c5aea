"""A prefill that prunes: it runs the decoder's stages, keeps the books and hands every layer the shortened tensors.

The books lie where the prompt lies. Layers may lie on other devices, and what meets their states goes there.

Axes: B samples, N positions of this call, M physical rows that are left, V visual tokens still alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.contract import AttentionView, Scorer
from vtprune.errors import InputError
from vtprune.hooks.alive import Alive, Cut, cut_counts, make_cut, observe_all
from vtprune.hooks.cache import CacheRecord, Group, physical_length, record_of
from vtprune.hooks.call import GroupInputs, check_per_token, keep_angles, padding_mask, token_positions
from vtprune.hooks.families.base import Parts, Prompt
from vtprune.hooks.masks import Masks
from vtprune.hooks.rows import Rows
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.layout import Layout
from vtprune.plan import Plan, Site
from vtprune.report import Kept

__all__ = ["Prefill"]


class Prefill:
    """State of one pruned prefill. `plans` holds one plan a sample; they differ in counts only."""

    def __init__(
        self, parts: Parts, prompt: Prompt, layout: Layout, plans: Sequence[Plan], *, want_scores: bool
    ) -> None:
        self.parts, self.prompt, self.layout, self.plans = parts, prompt, layout, plans
        self.stages = plans[0].stages
        self.batch, self.length = layout.real.shape
        counts = [self.length] * self.batch
        if prompt.attention_mask is not None:
            counts = layout.real.sum(1).tolist()
        self.text_counts = [n - v for n, v in zip(counts, layout.counts, strict=True)]
        self.rows = Rows.all_of(layout.real, counts)
        self.alive = Alive.all_of(layout.counts, layout.real.device)
        self.kept: list[Kept] = []
        # (first layer, rows of its group, alive visual tokens of each sample), for the report
        self.widths: list[tuple[int, int, list[int]]] = [(0, self.length, list(layout.counts))]
        self.pruned = False
        self.past = 0
        self._want_scores = want_scores
        self._groups: list[Group] = []
        # what layers get instead of the host's tensors, by their window; None as long as the host's are right
        self._inputs: dict[int | None, GroupInputs] | None = None
        self._masks = Masks(parts, prompt.blocks)
        self._shift: Tensor | None = None
        self._lag: Tensor | None = None

    # before the decoder

    def text(self, arguments: dict[str, Any], left: tuple[Tensor, list[int]] | None) -> dict[str, Any]:
        """Apply the tower's cuts and run the `input` stages; called before the text model runs.

        Args:
            arguments: of the text model.
            left: [B, V] ordinal (1, 2, ...) of the tower stage at which each token left, 0 for survivors, and how many
                survivors each sample should have; or None.
        """
        check_per_token(arguments, self.length, "the text model")
        hidden, cache = arguments["inputs_embeds"], arguments.get("past_key_values")
        self._cache, self._old = cache, record_of(cache)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        home = self.layout.real.device
        self._position = token_positions(arguments.get("position_ids"), self.past, hidden).to(home)
        mask = padding_mask(arguments, self.prompt, self.parts)
        self._mask = None if mask is None else mask.to(home).bool()
        self._masks.begin(cache, self._mask, self.past, self.past + self.length)
        self._boundaries = {s.site.index for s in self.stages if s.site.kind == "layer"}
        if self._old is not None:
            self._boundaries |= {g.first for g in self._old.groups}

        compact = False
        if left is not None and self._take_tower_cuts(*left):
            hidden = keep_tokens([hidden], self._drop())[0]
        for ordinal, stage in enumerate(self.stages):
            if stage.site.kind == "input":
                _, hidden = self._stage(ordinal, hidden)
                compact = compact or (self.pruned and stage.positions == "compact")
        group = self._open_group(0, compact)
        self.widths[0] = (0, self.rows.length, list(self.alive.counts))
        self._entered, self._entry_shift = self.rows, self._shift
        if group.columns is None:
            return arguments
        self._inputs = None if self._masks.plain else {}
        changed = dict(arguments, inputs_embeds=hidden, position_ids=self._positions())
        changed["attention_mask"] = group.mask(self._mask, group.length, self.past, self.batch, hidden.device)
        if changed["attention_mask"] is None and cache is None:
            # without a cache and a mask the host would read gaps in position_ids as packed sequences
            changed["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return changed

    def _take_tower_cuts(self, left: Tensor, expected: list[int]) -> bool:
        """Book what the tower dropped; True if anything left."""
        # all stages before the decoder's own are the tower's, and those that cut are numbered 1, 2, ...
        stages = [s for s in self.stages if s.site.kind == "vision"]
        left, valid = left.to(self.layout.real.device), self.alive.valid
        survivors = (left == 0) & valid
        for ordinal, stage in enumerate(stages, start=1):
            here = ((left == 0) | (left > ordinal)) & valid
            self.kept.append(Kept(stage.site, tuple(row.nonzero()[:, 0] for row in here)))
        counts = survivors.sum(1).tolist()
        if counts != expected and not stages[-1].adaptive:
            raise InputError(
                f"the image features hold {counts} tokens a sample instead of {expected}: they were encoded while this "
                "pruning was not attached. Encode the images again under the session."
            )
        if counts == self.alive.counts:
            return False
        self.alive, _ = self.alive.keep(survivors, counts)
        return True

    # decoder layers

    def layer(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """What decoder layer `index` runs on; None leaves it as the host has it."""
        if index in self._boundaries and index > 0:
            check_per_token(arguments, self.rows.length, f"decoder layer {index}")
            cut_index, compact = None, False
            for ordinal, stage in enumerate(self.stages):
                if stage.site == Site("layer", index):
                    cut_index, hidden = self._stage(ordinal, hidden)
                    compact = self.pruned and stage.positions == "compact"  # earlier gaps close without a cut here too
            if cut_index is not None or compact or self._old is not None:
                self._open_group(index, compact)
                self.widths.append((index, self.rows.length, list(self.alive.counts)))
                self._inputs = {}
        if self._inputs is None:
            return None
        window = self._masks.window(index)
        if window not in self._inputs:
            self._inputs[window] = self._prepare(index, hidden, arguments)
        return hidden, {**arguments, **vars(self._inputs[window])}

    def _prepare(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> GroupInputs:
        """Make the tensors for layer `index` and its like in the newest group."""
        group, first = self._groups[-1], self._groups[0]
        embeddings, position = arguments["position_embeddings"], arguments.get("position_ids")
        if group.lag is not first.lag or self._shift is not self._entry_shift:
            position = self._positions()
            embeddings = self.parts.rotary(hidden, position_ids=position.to(hidden.device))
        elif self.rows is not self._entered:
            # the host's tensors hold the rows that entered the text model
            rows = self._entered.row_of(self.rows.position, self.length)
            embeddings = [keep_angles(t, rows) for t in embeddings]
            if position is not None:
                position = keep_tokens([position.expand(self.batch, -1)], rows)[0]
        mask = self._masks.of(index, group, hidden)
        return GroupInputs(mask, position, (embeddings[0], embeddings[1]))

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
        """Show decoder layer `block`'s attention (see `Observer`) to the scorers that asked for it."""
        past, group, device = key.shape[2] - query.shape[2], self._groups[-1], query.device
        rows, alive, layout = self.rows.to(device), self.alive.to(device), self.layout.to(device)
        last = rows.last()

        def row(states: Tensor, at: Tensor) -> Tensor:
            return states.gather(2, at[:, None, None, None].expand(-1, states.shape[1], 1, states.shape[3]))

        visual = layout.position.gather(1, alive.original)
        view = AttentionView(
            block=block,
            query=row(query, last),
            key=key,
            value=value,
            scaling=scaling,
            softcap=softcap,
            real=self._masks.row(block, group, rows.position.gather(1, last[:, None]), key.shape[2]),
            column=rows.row_of(visual, self.length) + past,
            valid=alive.valid,
            query_value=row(value, last + past),
            has_cls=False,
        )
        observe_all(scorers, view, alive)
        # stays on the device until a cut reads it
        self.alive.memory = alive.memory

    # after the decoder

    def text_output(self, hidden: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D], zeros where tokens left, so that logits keep the prompt's length."""
        return self.rows.scatter_back(hidden, self.length) if self.pruned else hidden

    def record(self) -> CacheRecord:
        """What the cache must remember of this conversation."""
        return CacheRecord(self.past + self.length, self._groups, self.batch)

    # one cut

    def _stage(self, ordinal: int, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        """Run stage `ordinal` on [B, M, D] states.

        Returns:
            [B, M'] index of the rows that stay (None if all do), and their states.
        """
        stage = self.stages[ordinal]
        keep = [
            cut_counts(plan.stages[ordinal], [total], [now])[0]
            for plan, total, now in zip(self.plans, self.layout.counts, self.alive.counts, strict=True)
        ]
        if keep == self.alive.counts:
            self.kept.append(self._kept(stage.site, None))
            return None, hidden
        alive, layout = self.alive.to(hidden.device), self.layout.to(hidden.device)
        rows = self.rows.to(hidden.device).row_of(layout.position.gather(1, alive.original), self.length)
        visual = keep_tokens([hidden], rows)[0]
        grids = [[(g.rows, g.cols) for g in sample] for sample in self.layout.grids]
        text_key = self._text_key() if stage.scorer.reads_prompt else ()
        cut = make_cut(stage, alive, visual, keep, layout, grids, text_key, self._want_scores)
        if cut.owner is not None:
            merged = merge_tokens(visual, cut.owner, alive.valid)
            # padding of the V axis is written to a spare row behind the last one
            rows = rows.masked_fill(~alive.valid, hidden.shape[1])
            spare = torch.cat([hidden, hidden[:, :1]], 1)
            hidden = spare.scatter(1, rows[..., None].expand_as(merged), merged)[:, :-1]
        self.alive = cut.alive.to(self.layout.real.device)
        self.kept.append(self._kept(stage.site, cut))
        index = self._drop()
        return index, keep_tokens([hidden], index)[0]

    def _drop(self) -> Tensor:
        """Take the rows of visual tokens that left out of the sequence; [B, M'] index of those that stay."""
        position = self.layout.position.gather(1, self.alive.original)
        marks = torch.zeros(self.batch, self.length, dtype=torch.bool, device=position.device)
        marks.scatter_(1, position, self.alive.valid)
        visual = self.prompt.visual
        if visual is None:
            raise InputError("a call without image placeholders cannot be pruned.")
        keep = (self.layout.real & ~visual) | marks
        self._gone = self.layout.real & ~keep
        counts = [text + now for text, now in zip(self.text_counts, self.alive.counts, strict=True)]
        self.rows, index = self.rows.keep(keep, counts)
        self.pruned = True
        return index

    def _open_group(self, first: int, compact: bool) -> Group:
        """Book the columns that the layers from `first` on will hold."""
        if compact:
            self._shift, self._lag = self._gone.cumsum(1), self._gone.sum(1)
        old = None if self._old is None else self._old.group_of(first)
        lag = self._lag
        if old is not None and old.lag is not None:
            lag = old.lag if lag is None else old.lag.to(lag.device) + lag
        physical = physical_length(self._cache, first)
        length = physical + self.rows.length
        if old is not None:
            past_dense = old.dense
        else:
            past_dense = self._mask is None or self.past == 0 or bool(self._mask[:, : self.past].all())
        dense = self.rows.dense and past_dense
        if not self.pruned and (old is None or old.columns is None):
            group = Group(first, None, length, lag, dense)
        else:
            device = self.rows.position.device
            known = Group(0, None, self.past, None, True) if old is None else old
            logical = self.past if self._old is None else self._old.length
            past = known.columns_to(physical, logical, self.batch, device)
            new = (self.rows.position + self.past).masked_fill(~self.rows.filled, -1)
            group = Group(first, torch.cat([past, new], 1), length, lag, dense)
        self._groups.append(group)
        return group

    def _positions(self) -> Tensor:
        """[..., B, M] position ids of the rows in the newest group."""
        position = self._position if self._shift is None else self._position - self._shift
        position = position.gather(-1, self.rows.position.expand(*position.shape[:-2], -1, -1))
        old = None if self._old is None else self._old.group_of(self._groups[-1].first)
        return position if old is None or old.lag is None else position - old.lag[:, None].to(position.device)

    def _kept(self, site: Site, cut: Cut | None) -> Kept:
        def split(values: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
            return tuple(row[:n] for row, n in zip(values, counts, strict=True))

        indices = split(self.alive.original, self.alive.counts)
        if cut is None or cut.scores is None:
            return Kept(site, indices)
        counts, home = cut.before.counts, self.layout.real.device
        return Kept(site, indices, split(cut.scores.to(home), counts), split(cut.before.original.to(home), counts))

    def _text_key(self) -> tuple[tuple[int, ...], ...]:
        ids, visual = self.prompt.input_ids, self.prompt.visual
        if ids is None or visual is None:
            return ((),) * self.batch
        text = self.layout.real & ~visual
        return tuple(tuple(row[keep].tolist()) for row, keep in zip(ids, text, strict=True))
