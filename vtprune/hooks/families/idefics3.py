"""Idefics3 and SmolVLM: crops of one size, pixel shuffle, text tokens between the crops of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts, decoder_geometry
from vtprune.layout import ImageGrid


def _side(config: Any) -> int:
    """Tokens along one side of a crop."""
    return config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor


@FAMILIES.register("idefics3")
class Idefics3(Family):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`: one square grid a crop.

    The processor cuts images into crops and samples videos into frames before the model sees them; to the model each of
    them is an image.
    """

    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    summary = "Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration (a crop or frame is an image)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        return decoder_geometry(cls.name, config.text_config, _side(config) ** 2, dynamic=True)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ("text_model", "vision_model", "connector")

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        text = root.text_model
        return Parts(root=root, text_model=text, layers=tuple(text.layers), rotary=text.rotary_emb)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`; the crops of a sample, whose padding crops are all zero as the host has it."""
        pixels = arguments[modality.pixels]
        crops = (pixels != 0).flatten(2).any(-1).sum(1).tolist()
        side = _side(self.config)
        return [(ImageGrid(side, side),) * number for number in crops]

    def carried(self, arguments: Mapping[str, Any]) -> dict[int, list[Grids]]:
        """See `Family.carried`."""
        found = super().carried(arguments)
        return {token: [(grid,) for crops in samples for grid in crops] for token, samples in found.items()}
