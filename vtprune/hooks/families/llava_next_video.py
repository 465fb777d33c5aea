"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, videos pooled frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vtprune.hooks.families.base import FAMILIES, Grids, Modality
from vtprune.hooks.families.llava import check_feature_layer
from vtprune.hooks.families.llava_next import LlavaNext
from vtprune.hooks.families.square import patches_a_side
from vtprune.hooks.units import Medium, raster
from vtprune.layout import ImageGrid


@FAMILIES.register("llava_next_video")
class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`: a pooled grid a frame, no newline tokens in videos."""

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    summary = "LlavaNextVideoForConditionalGeneration (crops, newline tokens, video)"
    video_end: ClassVar[Grids] = ()  # behind the last frame of a video

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
        """See `Family.grids_of_features`; videos come as one tensor [videos, frames x tokens and the end, D]."""
        if isinstance(features, Tensor):
            return [self._video(features.shape[1] // self.frame_side() ** 2)] * len(features)
        return super().grids_of_features(features)

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`; the pooling of a frame stands between tower and projector and joins whole squares."""
        if modality.name == "image":
            return super().media(modality, arguments)
        side = patches_a_side(self.config)
        videos, frames = arguments[modality.pixels].shape[:2]
        return [Medium((raster(side, side, self.config.spatial_pool_stride),) * frames)] * videos

    def frame_side(self) -> int:
        """Tokens along one side of a pooled frame."""
        return patches_a_side(self.config) // self.config.spatial_pool_stride

    def _video(self, frames: int) -> Grids:
        side = self.frame_side()
        return (*(ImageGrid(side, side, frame=frame) for frame in range(frames)), *self.video_end)
