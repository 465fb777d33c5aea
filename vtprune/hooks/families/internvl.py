"""InternVL in its Hugging Face class: tiles of one size, pixel shuffle, Qwen2 or Llama decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Grids, Modality, Parts
from vtprune.hooks.families.llava import check_feature_layer, feature_block
from vtprune.hooks.families.square import SquareFamily
from vtprune.hooks.units import Tower, Unit, raster
from vtprune.layout import ImageGrid


def _first(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def _merge(config: Any) -> int:
    """Patches along one side of a token."""
    return int(1 / config.downsample_ratio)


def _side(config: Any) -> int:
    """Tokens along one side of a tile, after the pixel shuffle."""
    vision = config.vision_config
    return _first(vision.image_size) // _first(vision.patch_size) // _merge(config)


def _vision(config: Any) -> VisionGeometry:
    vision, text, cell = config.vision_config, config.text_config, _merge(config) ** 2
    return VisionGeometry(
        blocks=vision.num_hidden_layers,
        feature_block=feature_block(config),
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        has_cls=True,
        patches=_side(config) ** 2 * cell,
        patch_dim=vision.num_channels * _first(vision.patch_size) ** 2,
        projector=(vision.hidden_size * cell, text.hidden_size, text.hidden_size),
        cell=cell,
    )


@FAMILIES.register("internvl")
class InternVL(SquareFamily):
    """`InternVLForConditionalGeneration`: one square grid a tile.

    The processor cuts large images into tiles and samples videos into frames before the model sees them; to the model
    each tile or frame is an image.
    """

    name = "internvl"
    model_types = ("internvl",)
    summary = "InternVLForConditionalGeneration (InternVL 2.5 / 3 / 3.5, pixel shuffle; a tile or frame is an image)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported with "
                "internvl: CLS would be shuffled among the patches; use 'default'."
            )
        return decoder_geometry(cls.name, config.text_config, _side(config) ** 2, vision=_vision(config), dynamic=True)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        tower = Tower(root.vision_tower, tuple(root.vision_tower.encoder.layer), root.multi_modal_projector)
        return dataclasses.replace(super().find_parts(root), tower=tower)

    def side(self) -> int:
        """See `SquareFamily.side`."""
        return _side(self.config)

    def unit(self, grid: ImageGrid) -> Unit:
        """See `Family.unit`."""
        merge = _merge(self.config)
        return raster(grid.rows * merge, grid.cols * merge, merge)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        return super().grids(modality, arguments)
