"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, videos pooled frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtprune.hooks.families.base import FAMILIES, Grids, Modality
from vtprune.hooks.families.llava import check_feature_layer
from vtprune.hooks.families.llava_next import LlavaNext
from vtprune.layout import ImageGrid


@FAMILIES.register("llava_next_video")
class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`: a pooled grid a frame, no newline tokens in videos."""

    name = "llava_next_video"
    summary = "LlavaNextVideoForConditionalGeneration (crops, newline tokens, video)"

    @classmethod
    def matches(cls, config: Any) -> bool:
        """See `Family.matches`."""
        return getattr(config, "model_type", None) == "llava_next_video"

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        return (*super().modalities(), Modality("video", self.config.video_token_id, "pixel_values_videos"))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        if modality.name == "image":
            return super().grids(modality, arguments)
        check_feature_layer(self.config, arguments)
        videos, frames = arguments[modality.pixels].shape[:2]
        return [self._video(frames)] * videos

    def grids_of_features(self, features: Any) -> list[Grids]:
        """See `Family.grids_of_features`; videos come as one tensor [videos, frames x tokens, D]."""
        if isinstance(features, Tensor):
            return [self._video(features.shape[1] // self._frame_side**2)] * len(features)
        return super().grids_of_features(features)

    @property
    def _frame_side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.spatial_pool_stride

    def _video(self, frames: int) -> Grids:
        return tuple(ImageGrid(self._frame_side, self._frame_side, frame=frame) for frame in range(frames))
