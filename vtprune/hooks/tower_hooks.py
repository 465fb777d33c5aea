"""The hooks of one session on the vision side of its model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import BudgetError
from vtprune.hooks.accounting import unpruned_tower
from vtprune.hooks.families.base import Family, Modality, Prompt
from vtprune.hooks.key_bias import weighed_blocks
from vtprune.hooks.planner import Planner
from vtprune.hooks.probe import attach_probe
from vtprune.hooks.tower import TowerCall
from vtprune.hooks.tower_scores import TowerScores
from vtprune.hooks.units import Medium, Tower
from vtprune.hooks.validate import check_counts, watched_blocks
from vtprune.plan import Stage

__all__ = ["TowerHooks"]

Hook = Callable[[nn.Module, Callable[..., Any]], None]
Heads = Callable[[Tensor], Tensor]


class _Runs(threading.local):
    """What is being encoded in this thread, and FLOPs (as run, unpruned) of the last run of each modality."""

    def __init__(self) -> None:
        self.call: TowerCall | None = None
        self.encoding = False
        self.flops: dict[str, tuple[int, int]] = {}
        self.scores: list[TowerScores] = []


class TowerHooks:
    """Cuts the tower whenever the model encodes images, and counts what it costs."""

    def __init__(self, family: Family, planner: Planner, *, record_scores: bool, heads: Heads | None = None) -> None:
        """`heads` is called with the states of a block's attention, [B, H, M, d], where this process holds some of the
        heads only, and brings all of them together."""
        self._family, self._planner, parts = family, planner, family.parts()
        if parts.tower is None:
            raise ValueError(f"family {family.name!r} opens no tower.")
        self._towers = {"image": parts.tower, "video": parts.video_tower or parts.tower}
        self._cuts = bool(planner.nominal.at("vision")) and not planner.inactive
        vision, config = planner.geometry.vision, parts.tower.module.config
        last = -1 if vision is None or not self._cuts else vision.feature_block
        self._weighed = weighed_blocks(planner.nominal, last, config)
        self._record_scores, self._heads = record_scores, heads
        self._runs = _Runs()

    @contextlib.contextmanager
    def encoding(self, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Wraps the call that encodes the images (or videos) of `arguments`."""
        if self._runs.encoding:
            # some hosts encode videos by way of their images
            yield
            return
        media = self._family.media(modality, arguments)
        with self.cutting(modality, media, [self._stages(medium.tokens) for medium in media]):
            yield

    @contextlib.contextmanager
    def cutting(self, modality: Modality, media: Sequence[Medium], stages: Sequence[Sequence[Stage]]) -> Iterator[None]:
        """Wraps a run of the tower on `media`, each with the tower's stages as planned on it."""
        runs, geometry = self._runs, self._planner.geometry
        tower = self._towers[modality.name]
        full = unpruned_tower(geometry, tower, media)
        if self._cuts and media:
            runs.call = TowerCall(geometry, tower, media, stages, want_scores=self._record_scores)
        runs.encoding = True
        try:
            yield
            runs.flops[modality.name] = full if runs.call is None else runs.call.flops(), full
            if runs.call is not None and runs.call.scores is not None:
                runs.scores.append(runs.call.scores)
        finally:
            runs.call, runs.encoding = None, False

    def flops(self) -> tuple[int, int]:
        """FLOPs, as run and unpruned, of what was encoded since the last call; 0 if nothing was."""
        mine, self._runs.flops = self._runs.flops, {}
        return sum(part for part, _ in mine.values()), sum(full for _, full in mine.values())

    def scores(self) -> TowerScores | None:
        """What the scorers gave since the last call, if the tower ran once."""
        mine, self._runs.scores = self._runs.scores, []
        return mine[0] if len(mine) == 1 else None

    def left(self, prompt: Prompt) -> list[int] | None:
        """Visual tokens of each sample that come out of the tower (the target, if its last stage is adaptive).

        Raises:
            InputError, BudgetError: if the tower cannot keep what the budget says.
        """
        if not self._cuts:
            return None
        sizes = [[sum(grid.tokens for grid in grids) for grids in images] for images in prompt.images]
        stages = {size: self._stages(size) for sample in sizes for size in sample}
        check_counts(prompt, [stage for mine in stages.values() for stage in mine])
        return [sum(stages[size][-1].count(size) for size in sample) for sample in sizes]

    def _stages(self, tokens: int) -> tuple[Stage, ...]:
        try:
            return self._planner.tower(tokens)
        except BudgetError as error:
            raise BudgetError(
                f"{error} The tower encodes images before it is known which prompt they belong to, so an image (also a "
                "tile or crop that is one to the model) is counted by itself; pass a fraction, such as keep=0.25.",
                floor=error.floor,
            ) from error

    def attach(self, pre: Hook, post: Hook, undo: list[Callable[[], object]]) -> None:
        """Add the hooks with `pre` and `post`; what else must be undone goes to `undo`."""
        if not self._cuts:
            return
        tower = self._towers["image"]
        for each in dict.fromkeys(self._towers.values()):
            self._attach_blocks(each, pre, post, undo)
        if tower.packing != "segments":
            pre(tower.entrance or tower.projector, self._on_projector)
        post(tower.projector, self._after_projector)
        for tap in tower.taps:
            post(tap, self._after_tap)

    def _attach_blocks(self, tower: Tower, pre: Hook, post: Hook, undo: list[Callable[[], object]]) -> None:
        runs, heads = self._runs, self._heads
        for index, block in enumerate(tower.blocks):
            pre(block, self._on_block(index))
            if tower.packing == "padded":
                pre(self._family.attention(block), self._on_attention)
        if tower.packing != "segments":
            post(tower.module, self._after_tower)
        else:
            post(tower.blocks[-1], self._after_block(len(tower.blocks) - 1))
        watched: dict[int, Any] = {block: [] for block in self._weighed}
        for block, scorers in (watched | watched_blocks(self._planner.nominal, "vision")).items():

            def observe(*seen: Any, block: int = block, scorers: Any = scorers) -> Tensor | None:
                if runs.call is None:
                    return None
                if heads is not None:
                    seen = (*map(heads, seen[:3]), *seen[3:])
                return runs.call.observe(block, scorers, *seen)

            undo.append(attach_probe(self._family.attention(tower.blocks[block]), observe))

    def _on_block(self, index: int) -> Callable[..., Any]:
        runs = self._runs

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if runs.call is None else runs.call.block(index, args[0], args[1:], kwargs)

        return hook

    def _after_block(self, index: int) -> Callable[..., Any]:
        runs = self._runs

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
            return None if runs.call is None or output is None else runs.call.after_block(index, output)

        return hook

    def _on_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._runs.call is None:
            return None
        changed = self._runs.call.attention(args[0] if args else kwargs["hidden_states"], kwargs)
        return None if changed is None else (args, changed)

    def _after_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call, vision = self._runs.call, self._planner.geometry.vision
        if call is None or vision is None or output is None:
            return None
        output.last_hidden_state = call.laid_out(output.last_hidden_state)
        # entry 0 is what entered the first block
        read, recorded = vision.feature_block + 1, getattr(output, "hidden_states", None)
        if recorded is not None and recorded[read] is not None:
            output.hidden_states = tuple(call.laid_out(s) if i == read else s for i, s in enumerate(recorded))
        return output

    def _on_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = None if self._runs.call is None else self._runs.call.before_projector(args[0])
        return None if rows is None else ((rows, *args[1:]), kwargs)

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        call = self._runs.call
        return None if call is None or output is None else call.after_projector(output)

    def _after_tap(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        call = self._runs.call
        return None if call is None or output is None else call.after_tap(output)
