"""Idefics3 and SmolVLM: crops of one size, pixel shuffle, text tokens between the crops of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.hooks.families.square import encoder_geometry, patches_a_side
from vtprune.hooks.units import Medium, Tower, Unit, raster
from vtprune.layout import ImageGrid


def _side(config: Any) -> int:
    """Tokens along one side of a crop."""
    return patches_a_side(config) // config.scale_factor


def _vision(config: Any) -> VisionGeometry:
    vision, cell = config.vision_config, config.scale_factor**2
    projector = (vision.hidden_size * cell, config.text_config.hidden_size)
    return encoder_geometry(config, vision.num_hidden_layers - 1, projector, cell=cell)


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
        return decoder_geometry(cls.name, config.text_config, _side(config) ** 2, vision=_vision(config), dynamic=True)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ("text_model", "vision_model", "connector")

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        text, vision = root.text_model, root.vision_model
        # the pixel shuffle before the projection needs all patches
        tower = Tower(vision, tuple(vision.encoder.layers), root.connector.modality_projection)
        return Parts(root=root, text_model=text, layers=tuple(text.layers), rotary=text.rotary_emb, tower=tower)

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

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`."""
        shown = arguments.get("pixel_attention_mask")
        hides = shown is not None and not bool(shown[(arguments[modality.pixels] != 0).flatten(2).any(-1)].all())
        mixed = (
            "pixel_attention_mask hides part of a crop from the vision tower, which a cut there does not know. Use a "
            "method that cuts at 'input' or later, or crops of one size."
        )
        crops = [grid for grids in self.grids(modality, arguments) for grid in grids]
        return [Medium((self.unit(crop),), mixed=mixed if hides else "") for crop in crops]

    def unit(self, grid: ImageGrid) -> Unit:
        """See `Family.unit`."""
        scale = self.config.scale_factor
        return raster(grid.rows * scale, grid.cols * scale, scale)
