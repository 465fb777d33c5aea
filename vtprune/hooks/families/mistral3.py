"""Mistral3 (Mistral Small 3.x with a Pixtral tower): images of any size, merged patches, row breaks as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, decoder_geometry
from vtprune.hooks.families.llava import check_feature_layer
from vtprune.hooks.families.llava_next import image_sizes
from vtprune.layout import ImageGrid

# side in tokens of the example before a prompt is known
_EXAMPLE = 16


@FAMILIES.register("mistral3")
class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`: one grid an image. The row-break tokens between its rows are text."""

    name = "mistral3"
    model_types = ("mistral3",)
    summary = "Mistral3ForConditionalGeneration (Pixtral tower, dynamic resolution)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        return decoder_geometry(cls.name, config.text_config, _EXAMPLE**2, dynamic=True)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        cell = self.config.vision_config.patch_size * self.config.spatial_merge_size
        return [(ImageGrid(height // cell, width // cell),) for height, width in image_sizes(arguments)]
