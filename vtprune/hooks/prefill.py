"""A prefill that prunes: it runs the decoder's stages, keeps the books and hands every layer the shortened tensors.

The books lie where the prompt lies. Layers may lie on other devices, and what meets their states goes there.

Axes: B samples, N positions of this call, M physical rows that are left, V visual tokens still alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vtprune.contract import Scorer
from vtprune.hooks.alive import Alive, observe_all
from vtprune.hooks.asking import Answered, ask
from vtprune.hooks.cache import CacheRecord, Group, peek
from vtprune.hooks.call import GroupInputs, check_per_token, keep_angles, padding_mask, token_positions
from vtprune.hooks.families.base import Parts, Prompt
from vtprune.hooks.groups import Groups
from vtprune.hooks.masks import Masks
from vtprune.hooks.rows import Rows
from vtprune.hooks.survivors import Survivors
from vtprune.hooks.views import Books, Seen
from vtprune.kernels.keep_tokens import keep_tokens
from vtprune.layout import Layout
from vtprune.plan import Plan, Site, Stage
from vtprune.stopwatch import scoring

__all__ = ["Prefill"]


class Prefill:
    """State of one pruned prefill. `plans` holds one plan a sample; they differ in counts only."""

    def __init__(
        self, parts: Parts, prompt: Prompt, layout: Layout, plans: Sequence[Plan], *, want_scores: bool
    ) -> None:
        self.parts, self.prompt, self.layout = parts, prompt, layout
        self.batch, self.length = layout.real.shape
        # text tokens of each sample before a cut
        self.left = Survivors(prompt, layout, plans, want_scores=want_scores)
        self.text_counts = list(self.left.text_counts)
        # (first layer, rows of its group, alive visual tokens of each sample), for the report
        self.widths: list[tuple[int, int, list[int]]] = [(0, self.length, list(layout.counts))]
        # layers that a restart ran in full, rows and alive visual tokens in them; rows whose queries and keys were
        # computed only to be asked
        self.passes: list[tuple[int, int, list[int]]] = []
        self.asked: list[int] = []
        self.past = 0
        self._asking: Stage | None = None
        # [B, M] scores of all rows, from a layer that was asked which text may leave
        self._ranked: Tensor | None = None
        # what layers get instead of the host's tensors, by their window; None as long as the host's are right
        self._inputs: dict[int | None, GroupInputs] | None = None
        self._masks = Masks(parts, prompt.blocks)

    @property
    def rows(self) -> Rows:
        """What each row holds now."""
        return self.left.rows

    @property
    def alive(self) -> Alive:
        """Visual tokens that are left now."""
        return self.left.alive

    # before the decoder

    def text(self, arguments: dict[str, Any], departed: tuple[Tensor, list[int]] | None) -> dict[str, Any]:
        """Apply the tower's cuts and run the `input` stages; called before the text model runs.

        Args:
            arguments: of the text model.
            departed: [B, V, 4] why each token left the tower (see `read_departures`), 0 for survivors, and how many
                survivors each sample should have; or None.
        """
        check_per_token(arguments, self.length, "the text model")
        hidden, cache = arguments["inputs_embeds"], arguments.get("past_key_values")
        home, self._cache = self.layout.real.device, cache
        self.past = 0 if cache is None else int(cache.get_seq_length())
        position = token_positions(arguments.get("position_ids"), self.past, hidden).to(home)
        mask = padding_mask(arguments, self.prompt, self.parts)
        self._mask = None if mask is None else mask.to(home).bool()
        self._masks.begin(cache, self._mask, self.past, self.past + self.length)
        self._groups = Groups(cache, self.past, position, self._mask)
        self._boundaries = {s.site.index for s in self.left.stages if s.site.kind == "layer"}
        if self._groups.old is not None:
            self._boundaries |= {g.first for g in self._groups.old.groups}

        compact = False
        if departed is not None:
            hidden = self.left.leave_tower(departed[0].to(home), departed[1], hidden)
        for ordinal, stage in enumerate(self.left.stages):
            if stage.site.kind in ("input", "restart"):
                if stage.site.kind == "restart" and self.left.cuts(ordinal):
                    self._ask_pass(stage, self._enter(hidden, arguments, compact))
                hidden = self.left.cut(ordinal, hidden, self._ranked)
                compact = compact or (self.left.pruned and stage.positions == "compact")
        self.left.prepare(hidden)
        return self._enter(hidden, arguments, compact)

    def _enter(self, hidden: Tensor, arguments: dict[str, Any], compact: bool) -> dict[str, Any]:
        """The text model's arguments for the rows that are left before layer 0."""
        self._groups.known.clear()
        group = self._open_group(0, compact)
        self.widths = [(0, self.rows.length, list(self.alive.counts))]
        self._entered, self._entry_shift, self._inputs = self.rows, self._groups.shift, None
        if group.columns is None:
            return arguments
        self._inputs = None if self._masks.plain else {}
        changed = dict(arguments, inputs_embeds=hidden, position_ids=self._groups.positions(self.rows))
        changed["attention_mask"] = group.mask(self._mask, group.length, self.past, self.batch, hidden.device)
        if changed["attention_mask"] is None and self._cache is None:
            # without a cache and a mask the host would read gaps in position_ids as packed sequences
            changed["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return changed

    # decoder layers

    def layer(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """What decoder layer `index` runs on; None leaves it as the host has it."""
        if index in self._boundaries and index > 0:
            check_per_token(arguments, self.rows.length, f"decoder layer {index}")
            cut, compact = False, False
            # a pass that a restart breaks off makes no cuts
            for ordinal, stage in enumerate(self.left.stages if self._asking is None else ()):
                if stage.site == Site("layer", index):
                    if stage.looks_ahead and self.left.cuts(ordinal):
                        self._ask_layer(stage, hidden, arguments)
                    before = hidden
                    hidden = self.left.cut(ordinal, hidden)
                    # an adaptive stage may find that nothing should leave
                    cut = hidden is not before
                    # also closes gaps of earlier stages
                    compact = self.left.pruned and stage.positions == "compact"
            if cut or compact or self._groups.old is not None:
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
        position, embeddings = self._turned(hidden, arguments)
        return GroupInputs(self._masks.of(index, self._groups.newest, hidden), position, embeddings)

    def _turned(self, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Position ids and (cos, sin) of the newest group."""
        embeddings, position = arguments["position_embeddings"], arguments.get("position_ids")
        if not self._groups.lags_alike or self._groups.shift is not self._entry_shift:
            position = self._groups.positions(self.rows)
            embeddings = self.parts.rotary(hidden, position_ids=position.to(hidden.device))
        elif self.rows is not self._entered:
            # the host's tensors hold the rows that entered the text model
            rows = self._entered.row_of(self.rows.position, self.length)
            embeddings = [keep_angles(t, rows) for t in embeddings]
            if position is not None:
                position = keep_tokens([position.expand(self.batch, -1)], rows)[0]
        return position, (embeddings[0], embeddings[1])

    # signals

    def _ask_pass(self, stage: Stage, arguments: dict[str, Any]) -> None:
        """Run the text model on `arguments` up to the layer of a restart."""
        given = {**arguments, "use_cache": False, "output_hidden_states": False, "output_attentions": False}
        given["past_key_values"] = peek(self._cache) if self.past else None
        if not self.past and given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(self.rows.position, dtype=torch.bool)
        # forward, because the hooks on the text model itself belong to the run that counts
        self._ask(stage, self.parts.text_model.forward, given)
        self.passes.append((stage.site.index, self.rows.length, list(self.alive.counts)))

    def _ask_layer(self, stage: Stage, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Run the layer behind a cut up to its attention, on the tokens before the cut."""
        layer: Any = self.parts.layers[stage.site.index]
        self._open_group(stage.site.index, False)
        given = {name: value for name, value in arguments.items() if name != "hidden_states"}
        given["position_ids"], given["position_embeddings"] = self._turned(hidden, arguments)
        given |= {"attention_mask": None, "past_key_values": peek(self._cache) if self.past else None}
        self._ask(stage, functools.partial(layer.forward, hidden), given)
        self._groups.known.pop()

    def _ask(self, stage: Stage, run: Callable[..., Any], given: dict[str, Any]) -> None:
        self._asking = stage
        try:
            ask(functools.partial(run, **given), stage.site.index)
        finally:
            self._asking = None
        self.asked.append(self.rows.length)

    @scoring()
    def observe_transition(
        self,
        layer: int,
        part: Literal["attention", "mlp"],
        scorers: Sequence[Scorer],
        before: Tensor,
        after: Tensor,
    ) -> None:
        """Show what a sublayer made of its tokens [B, M, D] to the scorers that asked for it."""
        if self._asking is not None:
            return
        books = Books.on(before.device, self.rows, self.alive, self.layout)
        view, memory = books.transition(layer, part, before, after), books.alive.memory
        with torch.no_grad():
            for scorer in scorers:
                memory[scorer.name] = scorer.observe_transition(view, memory.get(scorer.name, {}))
        self.alive.memory = memory

    def observe(self, block: int, scorers: Sequence[Scorer], seen: Seen) -> None:
        """Show decoder layer `block`'s attention to the scorers that asked for it.

        Raises:
            Answered: if the layer was run only to be asked.
        """
        if self._asking is not None:
            scorers = (self._asking.scorer,) if self._asking.site.index == block else ()
        for scorer in scorers:
            with scoring():
                books = Books.on(seen.query.device, self.rows, self.alive, self.layout)
                view = books.attention(block, seen, scorer.queries, self._groups.newest, self._masks)
                observe_all([scorer], view, books.alive)
                # stays on the device until a cut reads it
                self.alive.memory = books.alive.memory
                if self._asking is not None and scorer.drops_text:
                    self._ranked = scorer.score_rows(view)
        if self._asking is not None and scorers:
            raise Answered

    # after the decoder

    def text_output(self, hidden: Tensor) -> Tensor:
        """[B, M, D] -> [B, N, D], zeros where tokens left, so that logits keep the prompt's length."""
        return self.rows.scatter_back(hidden, self.length) if self.left.pruned else hidden

    def record(self) -> CacheRecord:
        """What the cache must remember of this conversation."""
        return self._groups.record(self.length, self.batch)

    def _open_group(self, first: int, compact: bool) -> Group:
        """Book the columns that the layers from `first` on will hold."""
        if compact and self.left.gone is not None:
            self._groups.close_up(self.left.gone)
        return self._groups.open(first, self.rows, self.left.pruned)
