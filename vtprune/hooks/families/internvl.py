"""InternVL in its Hugging Face class: tiles of one size, pixel shuffle, Qwen2 or Llama decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, decoder_geometry
from vtprune.hooks.families.llava import check_feature_layer
from vtprune.layout import ImageGrid


def _side(config: Any) -> int:
    """Tokens along one side of a tile, after the pixel shuffle."""
    vision = config.vision_config
    image, patch = (v[0] if isinstance(v, (list, tuple)) else v for v in (vision.image_size, vision.patch_size))
    return int(image // patch * config.downsample_ratio)


@FAMILIES.register("internvl")
class InternVL(Family):
    """`InternVLForConditionalGeneration`: one square grid a tile.

    The processor cuts large images into tiles and samples videos into frames before the model sees them; to the model
    each tile or frame is an image.
    """

    name = "internvl"
    model_types = ("internvl",)
    summary = "InternVLForConditionalGeneration (InternVL 2.5 / 3 / 3.5, pixel shuffle; a tile or frame is an image)"
    images_differ = False

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported with "
                "internvl: CLS would be shuffled among the patches; use 'default'."
            )
        return decoder_geometry(cls.name, config.text_config, _side(config) ** 2, dynamic=True)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        return self.grids_of_features(arguments[modality.pixels])

    def grids_of_features(self, features: Any) -> list[Grids]:
        """See `Family.grids_of_features`."""
        side = _side(self.config)
        return [(ImageGrid(side, side),)] * len(features)
