"""Qwen3-VL: as Qwen2.5-VL, and visual features are added again after the first decoder layers (DeepStack)."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.hooks.families.base import FAMILIES
from vtprune.hooks.families.qwen2_vl import Qwen2VL


@FAMILIES.register("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    summary = "Qwen3VLForConditionalGeneration (DeepStack, dynamic resolution, M-RoPE, video)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        added = len(config.vision_config.deepstack_visual_indexes)
        return dataclasses.replace(super().geometry(config), deepstack=added)

    @classmethod
    def vision(cls, vision: Any) -> VisionGeometry:
        """See `Qwen2VL.vision`."""
        return dataclasses.replace(super().vision(vision), mlp_matrices=2, taps=tuple(vision.deepstack_visual_indexes))
