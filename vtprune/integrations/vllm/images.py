"""Pruning of encoded images outside a prompt: the engine's tower hooks and cuts, on the Hugging Face modules.

Axes: N tokens of an image, B of them kept, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.budget import Geometry
from vtprune.cells import split_in_proportion
from vtprune.errors import HostContractError, UnsupportedModelError
from vtprune.hooks.alive import Alive, make_cut, merge_states
from vtprune.hooks.departures import book_departures, read_departures
from vtprune.hooks.families.base import Family, Modality, family_of
from vtprune.hooks.planner import Planner
from vtprune.hooks.tower_hooks import TowerHooks
from vtprune.hooks.units import Medium
from vtprune.hooks.validate import check_plan
from vtprune.integrations.vllm.settings import Settings, check_served, image_plan
from vtprune.layout import ImageGrid, Layout
from vtprune.plan import Plan, Stage
from vtprune.views import TextView

__all__ = ["FAMILIES_SERVED", "ImagePruner", "checked_geometry"]

FAMILIES_SERVED = ("llava", "qwen2_vl", "internvl")

Grids = Sequence[Sequence[ImageGrid]]
"""The grids of each part (tile) of an image."""


def checked_geometry(config: Any, settings: Settings) -> Geometry:
    """The shape of the model, once it is known that the plugin can serve it.

    Raises:
        UnsupportedModelError, PlanError: if it cannot, or the method cannot run there.
    """
    family = family_of(config)
    if family.name not in FAMILIES_SERVED:
        raise UnsupportedModelError(
            f"the vLLM plugin serves the families {', '.join(FAMILIES_SERVED)}, got a {config.model_type!r} model "
            f"({family.name}). With transformers vtprune serves it."
        )
    geometry = family.geometry(config)
    check_served(settings.scorer, geometry)
    return geometry


class ImagePruner:
    """Hooks on one model's vision tower, and the cuts behind it.

    Attributes:
        geometry: the model's shape.
    """

    def __init__(self, root: nn.Module, settings: Settings, heads: Callable[[Tensor], Tensor] | None = None) -> None:
        """`root` holds the tower and the text model; for `heads` see `TowerHooks`."""
        self.geometry = checked_geometry(root.config, settings)
        self._family: Family = family_of(root.config)(root)
        self._scorer = settings.scorer.bind(root)
        planner = Planner(self.geometry, self._scorer, 0.5, "average", None)
        check_plan(planner.nominal, self.geometry)
        self._tower = TowerHooks(self._family, planner, record_scores=False, heads=heads)
        self._undo: list[Callable[[], object]] = []
        self._tower.attach(self._pre, self._post, self._undo)
        self._in_tower = bool(planner.nominal.at("vision"))
        self._media: list[list[Medium]] = []
        self._grids: list[Grids] = []

    def _pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _post(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True).remove)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._undo:
            self._undo.pop()()

    @property
    def _modality(self) -> Modality:
        return self._family.modalities()[0]

    @contextlib.contextmanager
    def encoding(self, arguments: Mapping[str, Any], kept: Sequence[int], parts: Sequence[int]) -> Iterator[None]:
        """Wraps the call that encodes the images of `arguments`.

        Args:
            arguments: `pixel_values`, and what else the family reads.
            kept: B of each image.
            parts: of how many of the model's images (tiles) each one consists.
        """
        media = self._family.media(self._modality, arguments)
        if len(media) != sum(parts):
            raise HostContractError(
                f"vLLM hands {len(media)} picture(s) to the tower, but its requests hold {sum(parts)}. Please report "
                "it with your vLLM version."
            )
        rest = iter(media)
        self._media = [[next(rest) for _ in range(n)] for n in parts]
        grids = iter(self._family.grids(self._modality, arguments))
        self._grids = [[next(grids) for _ in range(n)] for n in parts]
        stages = [
            mine for image, total in zip(self._media, kept, strict=True) for mine in self._tower_stages(image, total)
        ]
        with self._tower.cutting(self._modality, media, stages):
            yield

    def _tower_stages(self, image: Sequence[Medium], kept: int) -> list[tuple[Stage, ...]]:
        shares = split_in_proportion(kept, [medium.tokens for medium in image])
        return [self._plan(medium.tokens, n).at("vision") for medium, n in zip(image, shares, strict=True)]

    def grid_columns(self) -> list[int]:
        """Tokens in a row of each image of the last run (of its first tile)."""
        return [grids[0][0].cols for grids in self._grids]

    def _plan(self, tokens: int, kept: int) -> Plan:
        return image_plan(self._scorer, self.geometry, tokens, kept)

    @torch.no_grad()
    def finish(
        self, features: Sequence[Tensor], kept: Sequence[int], words: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What the LLM gets of each image, after the run that `encoding` wrapped.

        Args:
            features: [N, D] of each image, as the projector gave them.
            kept: B of each.
            words: [t, D] embeddings of what is asked about each, for methods that read text.

        Returns:
            for each image [B, D] and [B], which tokens these are (or whose places they take), increasing.

        Raises:
            HostContractError: if other features come than were encoded.
        """
        texts = [None] * len(kept) if words is None else [_asked(states) for states in words]
        return [
            self._finish(rows, image, grids, n, text)
            for rows, image, grids, n, text in zip(features, self._media, self._grids, kept, texts, strict=True)
        ]

    def _finish(
        self, rows: Tensor, image: Sequence[Medium], grids: Grids, kept: int, text: TextView | None
    ) -> tuple[Tensor, Tensor]:
        total = sum(medium.tokens for medium in image)
        if len(rows) != total:
            raise HostContractError(f"vLLM encoded an image as {len(rows)} tokens, where its grid has {total}.")
        everything = torch.ones(1, total, dtype=torch.bool, device=rows.device)
        layout = Layout.from_images(everything, everything, [grids])
        alive, hidden = Alive.all_of([total], rows.device), rows[None]
        stages = self._plan(total, kept).stages
        if self._in_tower and kept < total:
            stages = tuple(s for s in stages if s.site.kind == "vision")
            marks = read_departures(hidden, alive.valid)
            _, alive = book_departures(stages, alive, marks, [kept], layout)
            hidden = hidden[:, alive.original[0]]
            stages = self._plan(total, kept).at("input")
        for stage in stages:
            if stage.site.kind == "input" and kept < total:
                flat = [[(grid.rows, grid.cols) for part in grids for grid in part]]
                cut = make_cut(stage, alive, hidden, [kept], layout, flat, ((),), text, False)
                hidden = hidden if cut.merge is None else merge_states(hidden, cut.merge, alive)
                hidden, alive = hidden[:, cut.index[0]], cut.alive
        return hidden[0], alive.original[0]


def _asked(states: Tensor) -> TextView:
    """A question [t, D] as the text behind the last image of a prompt."""
    real = states.new_ones(1, len(states), dtype=torch.bool)
    return TextView(states[None], real, real)
