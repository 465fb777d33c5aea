"""GLM-4.1V: images of any size, 2x2 patches a token, M-RoPE, videos with the placeholder of images."""

from __future__ import annotations

from vtprune.hooks.families.base import FAMILIES, Modality
from vtprune.hooks.families.qwen2_vl import Qwen2VL


@FAMILIES.register("glm4v")
class Glm4v(Qwen2VL):
    """`Glm4vForConditionalGeneration`. The host tells images from videos by what the call carries: never both."""

    name = "glm4v"
    model_types = ("glm4v",)
    summary = "Glm4vForConditionalGeneration (dynamic resolution, M-RoPE, video)"

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        image, video = super().modalities()
        return image, Modality(video.name, image.token, video.pixels)
