"""Video-LLaVA: a tower for images and one for frames, one projector; frames keep their CLS token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.hooks.families.llava import check_feature_layer, clip_vision
from vtprune.hooks.families.square import encoder_tower, patches_a_side
from vtprune.hooks.units import Medium
from vtprune.layout import ImageGrid


def _images(arguments: Mapping[str, Any]) -> Any:
    """Pixels of the images; releases and processors differ in their name."""
    pixels = arguments.get("pixel_values")
    return arguments.get("pixel_values_images") if pixels is None else pixels


@FAMILIES.register("video_llava")
class VideoLlava(Family):
    """`VideoLlavaForConditionalGeneration`: a grid of patches an image; a CLS token and a grid of patches a frame.

    The CLS token of a frame counts as a visual token and may be dropped like one; it covers no pixels of its own.
    """

    name = "video_llava"
    model_types = ("video_llava",)
    summary = "VideoLlavaForConditionalGeneration (images, and videos whose frames keep their CLS token)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        vision = clip_vision(config)
        if not vision.has_cls:
            raise UnsupportedModelError(
                f"video_llava with a {config.vision_config.model_type!r} tower, which has no CLS token, is not "
                "supported; supported: clip_vision_model."
            )
        return decoder_geometry(cls.name, config.text_config, vision.patches, vision=vision, dynamic=True)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ("language_model", "image_tower", "video_tower", "multi_modal_projector")

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        images, videos = (encoder_tower(root, name) for name in ("image_tower", "video_tower"))
        return dataclasses.replace(super().find_parts(root), tower=images, video_tower=videos)

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        return (*super().modalities(), Modality("video", self.config.video_token_id, "pixel_values_videos"))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy not in (None, self.config.vision_feature_select_strategy):
            raise InputError(
                f"vision_feature_select_strategy={strategy!r} differs from the config's "
                f"{self.config.vision_feature_select_strategy!r}, on which the pruning was planned."
            )
        if modality.name == "video":
            videos, frames = arguments[modality.pixels].shape[:2]
            return [self._video(frames)] * videos
        return [self._image()] * len(_images(arguments))

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """See `Family.media`."""
        grids = self.grids(modality, arguments)
        if modality.name == "image":
            return [Medium((self.unit(image),)) for (image,) in grids]
        patches = self.unit(self._image()[0])
        frame = dataclasses.replace(patches, outputs=patches.outputs + 1, output=patches.output + 1, lead=1)
        return [Medium((frame,) * (len(video) // 2), others=len(video) // 2) for video in grids]

    def grids_of_features(self, features: Any) -> list[Grids]:
        """See `Family.grids_of_features`; of images, [images, patches, D]."""
        return [self._image()] * len(features)

    def remember(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> None:
        """See `Family.remember`. Features of videos are [videos x frames, 1 + patches, D]."""
        if modality.name == "video":
            # beams replace pooler_output, the tower's own states stay with it
            self._book[output.last_hidden_state] = self.grids(modality, arguments)[0]

    def carried(self, arguments: Mapping[str, Any]) -> dict[int, list[Grids]]:
        """See `Family.carried`."""
        encoded = dict(arguments.get("mm_encoder_outputs") or {})
        films = encoded.pop("video", None)
        result = super().carried({**arguments, "mm_encoder_outputs": encoded, "pixel_values": _images(arguments)})
        if films is not None:
            result[self.config.video_token_id].extend(self._encoded_videos(films))
        return result

    def _encoded_videos(self, output: Any) -> list[Grids]:
        video = self._book.get(output.last_hidden_state)
        if video is None:
            raise InputError(
                f"the call carries encoded features of {len(output.pooler_output)} frame(s), which were not encoded "
                "while this session was attached, so that nobody knows how many make a video. Encode them under the "
                "session, or pass pixels."
            )
        return [video] * (2 * len(output.pooler_output) // len(video))

    def _image(self) -> Grids:
        side = patches_a_side(self.config)
        return (ImageGrid(side, side),)

    def _video(self, frames: int) -> Grids:
        (patches,) = self._image()
        return tuple(
            grid
            for frame in range(frames)
            for grid in (
                ImageGrid(1, 1, frame=frame, newline=True),  # CLS
                ImageGrid(patches.rows, patches.cols, frame=frame),
            )
        )
