"""GLM-4.1V: images of any size, 2x2 patches a token, M-RoPE, videos with the placeholder of images."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtprune.budget import VisionGeometry
from vtprune.hooks.families.base import FAMILIES, Modality
from vtprune.hooks.families.qwen2_vl import Qwen2VL


@FAMILIES.register("glm4v")
class Glm4v(Qwen2VL):
    """`Glm4vForConditionalGeneration`. The host tells images from videos by what the call carries: never both."""

    name = "glm4v"
    model_types = ("glm4v",)
    summary = "Glm4vForConditionalGeneration (dynamic resolution, M-RoPE, video)"

    @classmethod
    def vision(cls, vision: Any) -> VisionGeometry:
        """See `Qwen2VL.vision`. The blocks' own width is called that of the output."""
        out = vision.out_hidden_size
        first = vision.hidden_size * vision.spatial_merge_size**2
        # a convolution over the cell, a square layer, and three of the same size (gate, up, down), counted as one
        return dataclasses.replace(
            super().vision(vision), intermediate=out, projector=(first, out, out, 3 * vision.intermediate_size)
        )

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        image, video = super().modalities()
        return image, Modality(video.name, image.token, video.pixels)
