"""LLaVA-NeXT (LLaVA-1.6): the image once as a whole, then in crops, with a newline token behind each row of crops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vtprune.budget import Geometry
from vtprune.errors import InputError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.hooks.families.llava import check_feature_layer, clip_vision
from vtprune.hooks.families.square import encoder_tower, patches_a_side
from vtprune.hooks.units import Medium, Unit, raster
from vtprune.layout import ImageGrid

__all__ = ["LlavaNext", "crop_rows_and_cols", "crop_units", "image_sizes"]


def image_sizes(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image of a call, from its `image_sizes`.

    Raises:
        InputError: if they are missing or not one an image.
    """
    sizes, number = arguments.get("image_sizes"), len(arguments["pixel_values"])
    if sizes is None or len(sizes) != number:
        raise InputError(
            f"the call carries {number} image(s) but image_sizes of {0 if sizes is None else len(sizes)}; without them "
            "nobody knows which token covers which pixels. Pass what the processor returned, image_sizes included."
        )
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def _stitched(config: Any, size: tuple[int, int]) -> tuple[int, int, torch.Tensor]:
    """Crops (down, across) of one image, and [rows, cols] the patches of all of them without padding, numbered row by
    row over all crops. Read off the functions that the host itself uses on the features."""
    side = patches_a_side(config)
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    patches = torch.arange(down * across * side**2).view(1, down * side, across * side)
    return down, across, unpad_image(patches, torch.tensor(size))[0]


def crop_rows_and_cols(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of the tokens of all crops of one image, padding removed, newline tokens not counted."""
    rows, cols = _stitched(config, size)[2].shape
    return rows, cols


def crop_units(config: Any, size: tuple[int, int]) -> tuple[Unit, ...]:
    """What the tower makes of one image: itself as a whole, then its crops. Padding becomes no token."""
    side = patches_a_side(config)
    down, across, kept = _stitched(config, size)
    rows, cols = kept[:, 0] // (across * side), kept[0] % (across * side)

    def span(lines: torch.Tensor, crop: int) -> tuple[int, int]:
        """First line of a crop that is kept, and how many are."""
        mine = lines[lines // side == crop]
        return (int(mine[0]) % side, len(mine)) if len(mine) else (0, 0)

    parts = [(span(rows, r), span(cols, c)) for r in range(down) for c in range(across)]
    return raster(side, side), *(raster(side, side, 1, (top, left, high, wide)) for (top, high), (left, wide) in parts)


@FAMILIES.register("llava_next")
class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`: a base grid and a grid of crops with newline tokens an image.

    A newline token counts as a visual token; in the decoder it may be dropped like one, but no cut in the tower drops
    it. It covers no pixels.
    """

    name = "llava_next"
    model_types = ("llava_next",)
    summary = "LlavaNextForConditionalGeneration (any-resolution crops, newline tokens)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`. The example is a square image of twice the tower's side."""
        vision = clip_vision(config)
        rows, cols = crop_rows_and_cols(config, (2 * config.vision_config.image_size,) * 2)
        tokens = vision.patches + rows * (cols + 1)
        return decoder_geometry(cls.name, config.text_config, tokens, vision=vision, dynamic=True)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        return dataclasses.replace(super().find_parts(root), tower=encoder_tower(root))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        return [self._grids(size) for size in image_sizes(arguments)]

    def _grids(self, size: Sequence[int]) -> Grids:
        side = patches_a_side(self.config)
        rows, cols = crop_rows_and_cols(self.config, (size[0], size[1]))
        return ImageGrid(side, side), ImageGrid(rows, cols + 1, newline=True)

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`."""
        sizes, grids = image_sizes(arguments), self.grids(modality, arguments)
        # a newline stands behind each row of the second grid
        return [
            Medium(crop_units(self.config, size), others=mine[1].rows) for size, mine in zip(sizes, grids, strict=True)
        ]
