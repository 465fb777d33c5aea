"""LLaVA-OneVision: a single image in crops, several images whole, videos pooled frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.errors import InputError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Grids, Modality
from vtprune.hooks.families.llava import check_feature_layer, clip_vision
from vtprune.hooks.families.llava_next import crop_rows_and_cols, crop_units, image_sizes
from vtprune.hooks.families.llava_next_video import LlavaNextVideo
from vtprune.hooks.families.square import patches_a_side
from vtprune.hooks.units import Medium, raster
from vtprune.layout import ImageGrid

_NEWLINE = ImageGrid(1, 1, newline=True)


def _shrunk(config: Any, size: tuple[int, int], ratio: str) -> tuple[int, int]:
    """(rows, cols) of the crops' tokens; more than `anyres_max_N` allows are interpolated down to N base grids."""
    side = patches_a_side(config)
    rows, cols = crop_rows_and_cols(config, size)
    excess = math.sqrt(rows * cols / (int(ratio.removeprefix("anyres_max_")) * side**2))
    return (int(rows // excess), int(cols // excess)) if excess > 1.1 else (rows, cols)


@FAMILIES.register("llava_onevision")
class LlavaOnevision(LlavaNextVideo):
    """`LlavaOnevisionForConditionalGeneration`.

    A newline token counts as a visual token and may be dropped like one; it covers no pixels.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    summary = "LlavaOnevisionForConditionalGeneration (crops, several images, video)"
    video_end = (_NEWLINE,)

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`. The example is a square image of twice the tower's side."""
        vision = clip_vision(config)
        size = (2 * config.vision_config.image_size,) * 2
        rows, cols = _shrunk(config, size, config.vision_aspect_ratio)
        tokens = vision.patches + rows * (cols + 1)
        return decoder_geometry(cls.name, config.text_config, tokens, vision=vision, dynamic=True)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        if modality.name == "video":
            return super().grids(modality, arguments)
        check_feature_layer(self.config, arguments)
        return [self._image(size, whole, ratio) for size, whole, ratio in self._images(arguments)]

    def _images(self, arguments: Mapping[str, Any]) -> list[tuple[tuple[int, int], bool, str]]:
        """Size of each image, whether it is alone in its prompt (and cut into crops), and its `vision_aspect_ratio`."""
        sizes = image_sizes(arguments)
        together = arguments.get("batch_num_images")
        alone = [True] * len(sizes) if together is None else [n == 1 for n in together.tolist() for _ in range(n)]
        if len(alone) != len(sizes):
            raise InputError(f"batch_num_images counts {len(alone)} images, but the call carries {len(sizes)}.")
        ratio = arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return [(size, mine, ratio) for size, mine in zip(sizes, alone, strict=True)]

    @property
    def _side(self) -> int:
        return patches_a_side(self.config)

    def _image(self, size: tuple[int, int], alone: bool, ratio: str) -> Grids:
        whole = ImageGrid(self._side, self._side)
        if not alone:
            return whole, _NEWLINE
        rows, cols = _shrunk(self.config, size, ratio)
        return whole, ImageGrid(rows, cols + 1, newline=True)

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`."""
        if modality.name == "image":
            return [self._medium(*image) for image in self._images(arguments)]
        videos, frames = arguments[modality.pixels].shape[:2]
        mixed = (
            "llava_onevision pools the frames of a video by interpolation behind the projector, so that a token mixes "
            "patches and no cut in the vision tower is exact. Use a method that cuts at 'input' or later, such as "
            "divprune or fastv."
        )
        return [Medium((raster(self._side, self._side),) * frames, others=1, mixed=mixed)] * videos

    def _medium(self, size: tuple[int, int], alone: bool, ratio: str) -> Medium:
        if not alone:
            return Medium((raster(self._side, self._side),), others=1)
        rows, cols = crop_rows_and_cols(self.config, size)
        mixed = (
            f"llava_onevision interpolates the {rows} x {cols} patches of an image of {size[0]} x {size[1]} pixels "
            f"behind the projector ({ratio}), so that a token mixes patches and no cut in the vision tower is exact. "
            "Pass a smaller image, or use a method that cuts at 'input' or later, such as divprune or fastv."
        )
        shrunk = _shrunk(self.config, size, ratio) != (rows, cols)
        return Medium(crop_units(self.config, size), others=rows, mixed=mixed if shrunk else "")

    def frame_side(self) -> int:
        """See `LlavaNextVideo.frame_side`."""
        return math.ceil(self._side / 2)
