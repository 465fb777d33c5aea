"""What the families share in which every image is one square grid of tokens, always of the same size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vtprune.budget import VisionGeometry
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.families.base import Family, Grids, Modality
from vtprune.hooks.units import Tower
from vtprune.layout import ImageGrid

__all__ = ["SquareFamily", "check_types", "encoder_geometry", "encoder_tower", "patches_a_side"]


def patches_a_side(config: Any) -> int:
    """Patches along one side of an image of the tower's own size."""
    vision = config.vision_config
    return vision.image_size // vision.patch_size


def check_types(config: Any, decoders: Collection[str], towers: Collection[str]) -> None:
    """Refuse decoders and towers of other model types than these.

    Raises:
        UnsupportedModelError: with both.
    """
    parts = (("decoder", config.text_config, decoders), ("tower", config.vision_config, towers))
    for part, theirs, legal in parts:
        if theirs.model_type not in legal:
            raise UnsupportedModelError(
                f"{config.model_type} with a {theirs.model_type!r} {part} is not supported; supported: "
                f"{', '.join(legal)}."
            )


def encoder_geometry(
    config: Any, feature_block: int, projector: tuple[int, ...], *, has_cls: bool = False, cell: int = 1
) -> VisionGeometry:
    """A tower of plain blocks (CLIP, SigLIP) that sees images of one size; for the arguments see `VisionGeometry`."""
    vision = config.vision_config
    return VisionGeometry(
        blocks=vision.num_hidden_layers,
        feature_block=feature_block,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        has_cls=has_cls,
        patches=patches_a_side(config) ** 2,
        patch_dim=vision.num_channels * vision.patch_size**2,
        projector=projector,
        cell=cell,
    )


def encoder_tower(root: Any, name: str = "vision_tower", entrance: Any = None) -> Tower:
    """The CLIP or SigLIP tower of that name, and the projector behind it; for `entrance` see `Tower`."""
    tower = getattr(root, name)
    # the tower lost one level of nesting between transformers releases
    encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder
    return Tower(tower, tuple(encoder.layers), root.multi_modal_projector, entrance=entrance)


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
