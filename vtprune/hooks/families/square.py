"""What the families share in which every image is one square grid of tokens, always of the same size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.hooks.families.base import Family, Grids, Modality
from vtprune.layout import ImageGrid

__all__ = ["SquareFamily", "patches_a_side"]


def patches_a_side(config: Any) -> int:
    """Patches along one side of an image of the tower's own size."""
    vision = config.vision_config
    return vision.image_size // vision.patch_size


class SquareFamily(Family):
    """A family whose images all have one square grid of `side()` x `side()` tokens, so that features alone tell it."""

    images_differ = False

    def side(self) -> int:
        """Tokens along one side; unless overridden a token is a patch."""
        return patches_a_side(self.config)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        return self.grids_of_features(arguments[modality.pixels])

    def grids_of_features(self, features: Any) -> list[Grids]:
        """See `Family.grids_of_features`."""
        side = self.side()
        return [(ImageGrid(side, side),)] * len(features)
