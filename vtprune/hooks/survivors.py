"""Who is left in a prefill, and the cuts that decide it.

Axes: B samples, N positions of this call, M physical rows that are left, V visual tokens still alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.contract import top_k_mask
from vtprune.errors import InputError
from vtprune.hooks.alive import Alive, cut_counts, make_cut, merge_states, record_cut, token_view
from vtprune.hooks.departures import book_departures
from vtprune.hooks.families.base import Prompt
from vtprune.hooks.rows import Rows
from vtprune.hooks.views import text_keys, text_view
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.layout import Layout
from vtprune.plan import Plan
from vtprune.report import Kept
from vtprune.stopwatch import scoring

__all__ = ["Survivors"]


class Survivors:
    """Books of one prefill. `plans` holds one plan a sample; they differ in counts only.

    Attributes:
        stages: the stages of the plans; their counts are those of the first sample.
        rows: what each physical row holds.
        alive: visual tokens that are left.
        text: [B, N] text tokens that are left.
        text_counts: how many, for each sample.
        kept: a record of each cut so far.
        gone: [B, N] tokens that have left, None before the first.
    """

    def __init__(self, prompt: Prompt, layout: Layout, plans: Sequence[Plan], *, want_scores: bool) -> None:
        if prompt.visual is None:
            raise InputError("a call without image placeholders cannot be pruned.")
        self.prompt, self.layout, self.plans = prompt, layout, plans
        self.stages = plans[0].stages
        batch, self.length = layout.real.shape
        counts = [self.length] * batch
        if prompt.attention_mask is not None:
            counts = layout.real.sum(1).tolist()
        self.text = layout.real & ~prompt.visual
        self.text_counts = [n - v for n, v in zip(counts, layout.counts, strict=True)]
        self.rows = Rows.all_of(layout.real, counts)
        self.alive = Alive.all_of(layout.counts, layout.real.device)
        self.kept: list[Kept] = []
        self.gone: Tensor | None = None
        self._want_scores = want_scores

    @property
    def pruned(self) -> bool:
        """A token has left."""
        return self.gone is not None

    def targets(self, ordinal: int) -> list[int]:
        """Survivors that stage `ordinal` asks of each sample."""
        return [
            cut_counts(plan.stages[ordinal], [total], [now])[0]
            for plan, total, now in zip(self.plans, self.layout.counts, self.alive.counts, strict=True)
        ]

    def cuts(self, ordinal: int) -> bool:
        """True if stage `ordinal` drops something."""
        return self.targets(ordinal) != self.alive.counts

    def leave_tower(self, marks: Tensor, expected: list[int], hidden: Tensor) -> Tensor:
        """Book what left in the tower; the arguments are those of `book_departures`, and [B, N, D] states.

        Returns:
            [B, M, D] states of the rows that stay.
        """
        stages = [s for s in self.stages if s.site.kind == "vision"]
        records, self.alive = book_departures(stages, self.alive, marks, expected, self.layout)
        self.kept.extend(records)
        return self._drop(hidden) if self.alive.counts != list(self.layout.counts) else hidden

    @torch.no_grad()
    def prepare(self, hidden: Tensor) -> None:
        """Show what enters the decoder's layers, [B, M, D], to the scorers that ask for it."""
        asking = {s.scorer.name: s for s in self.stages if s.site.kind == "layer" and s.scorer.reads_input}
        for name, stage in asking.items():
            with scoring():
                alive, layout, visual, _ = self._visual(hidden)
                text, grids = text_view(hidden, self.rows, self.text, self.layout), self._grids()
                view = token_view(stage.site, stage.scorer, alive, visual, alive.counts, layout, grids, (), text)
                self.alive.memory[name] = stage.scorer.prepare(view)

    def _grids(self) -> list[list[tuple[int, int]]]:
        """(rows, cols) of the images of each sample."""
        return [[(g.rows, g.cols) for g in sample] for sample in self.layout.grids]

    def _visual(self, hidden: Tensor) -> tuple[Alive, Layout, Tensor, Tensor]:
        """The books where the states [B, M, D] lie, the states [B, V, D] of alive visual tokens, and their rows."""
        alive, layout = self.alive.to(hidden.device), self.layout.to(hidden.device)
        rows = self.rows.to(hidden.device).row_of(layout.position.gather(1, alive.original), self.length)
        return alive, layout, keep_tokens([hidden], rows)[0], rows

    def cut(self, ordinal: int, hidden: Tensor, ranked: Tensor | None = None) -> Tensor:
        """Run stage `ordinal` on [B, M, D] states; returns those of the rows that stay, the same tensor if all do.

        Args:
            ordinal: which stage.
            hidden: the states.
            ranked: [B, M] scores of all rows, if the stage drops text too.
        """
        stage, keep, dropped = self.stages[ordinal], self.targets(ordinal), False
        if keep == self.alive.counts:
            self.kept.append(record_cut(stage.site, self.alive, None))
            return hidden
        if stage.scorer.drops_text and ranked is not None:
            keep, dropped = self._share(ranked.to(self.layout.real.device), keep), True
        alive, layout, visual, rows = self._visual(hidden)
        grids = self._grids()
        text_key = text_keys(self.prompt, self.layout) if stage.scorer.reads_prompt else ()
        text = text_view(hidden, self.rows, self.text, self.layout) if stage.scorer.reads_text else None
        cut = make_cut(stage, alive, visual, keep, layout, grids, text_key, text, self._want_scores)
        if cut.alive.counts == self.alive.counts and not dropped:
            self.kept.append(record_cut(stage.site, self.alive, cut))
            return hidden
        if cut.merge is not None:
            merged = merge_states(visual, cut.merge, alive)
            # padding of the V axis is written to a spare row behind the last one
            rows = rows.masked_fill(~alive.valid, hidden.shape[1])
            spare = torch.cat([hidden, hidden[:, :1]], 1)
            hidden = spare.scatter(1, rows[..., None].expand_as(merged), merged)[:, :-1]
        self.alive = cut.alive.to(self.layout.real.device)
        self.kept.append(record_cut(stage.site, self.alive, cut, self._text_indices() if dropped else None))
        return self._drop(hidden)

    @scoring()
    def _share(self, ranked: Tensor, keep: list[int]) -> list[int]:
        """Let text and visual tokens compete for as many rows as all text and `keep` visual tokens would fill.

        The last token stays, because the prompt's logits are read from it. Text that loses is taken from `text`.

        Returns:
            visual tokens that stay, for each sample.
        """
        places = [text + n for text, n in zip(self.text_counts, keep, strict=True)]
        ranked = ranked.float().scatter(1, self.rows.last()[:, None], float("inf"))
        stays = top_k_mask(ranked, torch.tensor(places, device=ranked.device), self.rows.filled)
        marks = torch.zeros_like(self.text).scatter(1, self.rows.position, stays)
        self.text = self.text & marks
        self.text_counts = self.text.sum(1).tolist()
        return [n - text for n, text in zip(places, self.text_counts, strict=True)]

    def _text_indices(self) -> tuple[Tensor, ...]:
        """For each sample, which of its text tokens are left."""
        visual = self.prompt.visual
        whole = self.layout.real & ~visual  # type: ignore[operator]
        return tuple(stays[there].nonzero()[:, 0] for stays, there in zip(self.text, whole, strict=True))

    def _drop(self, hidden: Tensor) -> Tensor:
        """Take the rows of tokens that left out of the sequence; [B, M, D] -> [B, M', D]."""
        position = self.layout.position.gather(1, self.alive.original)
        marks = torch.zeros(self.layout.real.shape, dtype=torch.bool, device=position.device)
        marks.scatter_(1, position, self.alive.valid)
        keep = self.text | marks
        self.gone = self.layout.real & ~keep
        counts = [text + now for text, now in zip(self.text_counts, self.alive.counts, strict=True)]
        self.rows, index = self.rows.keep(keep, counts)
        return keep_tokens([hidden], index)[0]
