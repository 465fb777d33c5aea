"""LLaVA-1.5 in its Hugging Face class: CLIP or SigLIP tower, two-layer projector, Llama / Mistral / Qwen2 decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Grids, Modality, Parts
from vtprune.hooks.families.square import SquareFamily, check_types, encoder_geometry, encoder_tower

__all__ = ["Llava", "check_feature_layer", "clip_vision", "feature_block"]

_TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # model_type: has a CLS token
_DECODERS = ("llama", "mistral", "qwen2")


def clip_vision(config: Any) -> VisionGeometry:
    """The tower of a LLaVA-like model that gives one feature a patch.

    Raises:
        UnsupportedModelError: if the tower, or what is taken from it, is a variant that cannot be pruned.
    """
    check_types(config, _DECODERS, _TOWERS)
    text, vision = config.text_config, config.vision_config
    has_cls = _TOWERS[vision.model_type]
    wanted = "default" if has_cls else "full"
    if config.vision_feature_select_strategy != wanted:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a "
            f"{vision.model_type} tower does not give one token a patch; use {wanted!r} with this tower."
        )
    projector = (vision.hidden_size, text.hidden_size, text.hidden_size)
    return encoder_geometry(config, feature_block(config), projector, has_cls=has_cls)


def feature_block(config: Any) -> int:
    """The tower block whose output the projector reads.

    Raises:
        UnsupportedModelError: if it reads several.
    """
    layer, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"vision_feature_layer must be one layer, got {layer}: features of several layers cannot be pruned "
            "consistently."
        )
    # hidden_states[i] is the output of block i - 1, and there are blocks + 1 of them
    return (layer if layer >= 0 else blocks + 1 + layer) - 1


def check_feature_layer(config: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a call that reads another tower layer than the one planned on.

    Raises:
        InputError: with both layers.
    """
    layer = arguments.get("vision_feature_layer")
    if layer is not None and layer != config.vision_feature_layer:
        raise InputError(
            f"vision_feature_layer={layer} differs from the config's {config.vision_feature_layer}, on which "
            "the pruning was planned. Set it in the config before prune()."
        )


@FAMILIES.register("llava")
class Llava(SquareFamily):
    """`LlavaForConditionalGeneration`, one grid of patches an image, one placeholder a patch."""

    name = "llava"
    model_types = ("llava",)
    summary = "LlavaForConditionalGeneration (CLIP or SigLIP tower; Llama, Mistral or Qwen2 decoder)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        vision = clip_vision(config)
        return decoder_geometry(cls.name, config.text_config, vision.patches, vision=vision)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        return dataclasses.replace(super().find_parts(root), tower=encoder_tower(root))

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`."""
        check_feature_layer(self.config, arguments)
        return super().grids(modality, arguments)
