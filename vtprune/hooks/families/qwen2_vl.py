"""Qwen2-VL and Qwen2.5-VL: images of any size, 2x2 patches a token, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.errors import InputError
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, decoder_geometry
from vtprune.layout import ImageGrid

__all__ = ["Qwen2VL"]

# tokens of an image of 448 x 448 pixels (28 a token), the example before a prompt is known
_EXAMPLE = 16 * 16


@FAMILIES.register("qwen2_vl")
class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    A grid an image, or a grid for each pair of frames of a video; sizes come with the call (`image_grid_thw`).
    """

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    summary = "Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration (dynamic resolution, M-RoPE, video)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        return decoder_geometry(cls.name, config.text_config, _EXAMPLE, dynamic=True, rotary_axes=3)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ("language_model", "visual")

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        return (*super().modalities(), Modality("video", self.config.video_token_id, "pixel_values_videos"))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        name = f"{modality.name}_grid_thw"
        sizes = arguments.get(name)
        if sizes is None:
            raise InputError(
                f"the call carries {modality.pixels} but no {name}, which says how many tokens each picture has. Pass "
                "what the processor returned."
            )
        return [self._grids(thw, modality.name == "video") for thw in sizes.tolist()]

    def _grids(self, thw: list[int], video: bool) -> Grids:
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        rows, cols = thw[1] // merge, thw[2] // merge
        if not video:
            return (ImageGrid(rows, cols),) * thw[0]
        return tuple(ImageGrid(rows, cols, frame=t * vision.temporal_patch_size) for t in range(thw[0]))
