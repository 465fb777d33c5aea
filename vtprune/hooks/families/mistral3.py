"""Mistral3 (Mistral Small 3.x with a Pixtral tower): images of any size, merged patches, row breaks as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.hooks.families.llava import check_feature_layer, feature_block
from vtprune.hooks.families.llava_next import image_sizes
from vtprune.hooks.units import Medium, Tower, raster
from vtprune.layout import ImageGrid

# side in tokens of the example before a prompt is known
_EXAMPLE = 16


def _vision(config: Any) -> VisionGeometry | None:
    if not isinstance(config.vision_feature_layer, int):
        return None
    vision, text, cell = config.vision_config, config.text_config, config.spatial_merge_size**2
    return VisionGeometry(
        blocks=vision.num_hidden_layers,
        feature_block=feature_block(config),
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        has_cls=False,
        patches=_EXAMPLE**2 * cell,
        patch_dim=vision.num_channels * vision.patch_size**2,
        projector=(text.hidden_size, text.hidden_size),
        cell=cell,
        mlp_matrices=3,
        merger=(vision.hidden_size * cell, vision.hidden_size, text.hidden_size),
    )


@FAMILIES.register("mistral3")
class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`: one grid an image. The row-break tokens between its rows are text."""

    name = "mistral3"
    model_types = ("mistral3",)
    summary = "Mistral3ForConditionalGeneration (Pixtral tower, dynamic resolution)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        return decoder_geometry(cls.name, config.text_config, _EXAMPLE**2, vision=_vision(config), dynamic=True)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        tower = root.vision_tower
        # the merger in the projector needs all patches, its last layer is the first that has a row a token and no more
        last = root.multi_modal_projector.linear_2
        mine = Tower(tower, tuple(tower.transformer.layers), last, "mask")
        return dataclasses.replace(super().find_parts(root), tower=mine)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        cell = self.config.vision_config.patch_size * self.config.spatial_merge_size
        return [(ImageGrid(height // cell, width // cell),) for height, width in image_sizes(arguments)]

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`."""
        patch, merge = self.config.vision_config.patch_size, self.config.spatial_merge_size
        sizes = image_sizes(arguments)
        return [Medium((raster(height // patch, width // patch, merge),)) for height, width in sizes]
