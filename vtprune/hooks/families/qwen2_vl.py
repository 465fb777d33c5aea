"""Qwen2-VL and Qwen2.5-VL: images of any size, 2x2 patches a token, M-RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from vtprune.budget import Geometry, VisionGeometry
from vtprune.errors import InputError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.hooks.units import Tower, Unit, blocks
from vtprune.layout import ImageGrid

__all__ = ["Qwen2VL"]

# tokens of an image of 448 x 448 pixels (28 a token), the example before a prompt is known
_EXAMPLE = 16 * 16


@lru_cache(maxsize=128)
def _windowed(rows: int, cols: int, merge: int, window: int, patch: int) -> Unit:
    """A frame of rows x cols tokens in the order of its windows, read off the function that the host itself uses."""
    order, ends = get_vision_window_index(torch.tensor([[1, rows * merge, cols * merge]]), merge, window, patch)
    return blocks(rows, cols, merge**2, order, tuple(ends.diff().tolist()))


@FAMILIES.register("qwen2_vl")
class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    A grid an image, or a grid for each pair of frames of a video; sizes come with the call (`image_grid_thw`).
    """

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    summary = "Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration (dynamic resolution, M-RoPE, video)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        return decoder_geometry(
            cls.name, config.text_config, _EXAMPLE, vision=cls.vision(config.vision_config), dynamic=True, rotary_axes=3
        )

    @classmethod
    def vision(cls, vision: Any) -> VisionGeometry:
        """The tower, from its config."""
        cell = vision.spatial_merge_size**2
        # the first of the two families has other names for the same widths
        first = vision.model_type.startswith("qwen2_vl")
        hidden, out = (vision.embed_dim, vision.hidden_size) if first else (vision.hidden_size, vision.out_hidden_size)
        return VisionGeometry(
            blocks=vision.depth,
            feature_block=vision.depth - 1,
            hidden=hidden,
            heads=vision.num_heads,
            intermediate=int(hidden * vision.mlp_ratio) if first else vision.intermediate_size,
            has_cls=False,
            patches=_EXAMPLE * cell,
            patch_dim=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector=(hidden * cell, hidden * cell, out),
            cell=cell,
            mlp_matrices=2 if first else 3,
            full_blocks=tuple(vision.fullatt_block_indexes) if hasattr(vision, "fullatt_block_indexes") else None,
        )

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ("language_model", "visual")

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        tower = root.visual
        taps = tuple(getattr(tower, "deepstack_merger_list", ()))
        return dataclasses.replace(
            super().find_parts(root), tower=Tower(tower, tuple(tower.blocks), tower.merger, "segments", taps)
        )

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        return (*super().modalities(), Modality("video", self.config.video_token_id, "pixel_values_videos"))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        name = f"{modality.name}_grid_thw"
        sizes = arguments.get(name)
        if sizes is None:
            raise InputError(
                f"the call carries {modality.pixels} but no {name}, which says how many tokens each picture has. Pass "
                "what the processor returned."
            )
        return [self._grids(thw, modality.name == "video") for thw in sizes.tolist()]

    def _grids(self, thw: list[int], video: bool) -> Grids:
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        rows, cols = thw[1] // merge, thw[2] // merge
        if not video:
            return (ImageGrid(rows, cols),) * thw[0]
        return tuple(ImageGrid(rows, cols, frame=t * vision.temporal_patch_size) for t in range(thw[0]))

    def unit(self, grid: ImageGrid) -> Unit:
        """See `Family.unit`."""
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        if not hasattr(vision, "fullatt_block_indexes"):
            return blocks(grid.rows, grid.cols, merge**2)
        return _windowed(grid.rows, grid.cols, merge, vision.window_size, vision.patch_size)
