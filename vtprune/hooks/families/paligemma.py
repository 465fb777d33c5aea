"""PaliGemma and PaliGemma 2: one feature a patch, a prompt that sees itself whole, a Gemma or Gemma 2 decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from vtprune.budget import Geometry
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Parts
from vtprune.hooks.families.square import SquareFamily, check_types, encoder_geometry, encoder_tower
from vtprune.hooks.windows import Blocks

_DECODERS = ("gemma", "gemma2")


@FAMILIES.register("paligemma")
class PaliGemma(SquareFamily):
    """`PaliGemmaForConditionalGeneration`: one grid of patches an image.

    The prompt (`token_type_ids` 0) sees itself in both directions, images and text alike and whatever the window; the
    answer (1) is causal.
    """

    name = "paligemma"
    model_types = ("paligemma",)
    summary = "PaliGemmaForConditionalGeneration (PaliGemma 1 and 2: two-way prompt; Gemma or Gemma 2 decoder)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        check_types(config, _DECODERS, ("siglip_vision_model",))
        text, tower = config.text_config, config.vision_config
        vision = encoder_geometry(config, tower.num_hidden_layers - 1, (tower.hidden_size, tower.projection_dim))
        return decoder_geometry(cls.name, text, vision.patches, vision=vision)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        return dataclasses.replace(super().find_parts(root), ready_masks=True, tower=encoder_tower(root))

    def blocks(self, arguments: Mapping[str, Any]) -> Blocks | None:
        """See `Family.blocks`."""
        cache, types = arguments.get("past_key_values"), arguments.get("token_type_ids")
        # in a running conversation the host makes a block of a new prompt only if it comes with pixels
        if cache is not None and cache.is_initialized and arguments.get("pixel_values") is None:
            return None
        if types is not None:
            return Blocks(torch.where(types == 0, 0, -1), within_window=False)
        if cache is not None and cache.is_initialized:
            return None
        # without types the host makes a causal mask, or none, and without one sdpa looks both ways
        mask, tokens = arguments.get("attention_mask"), arguments.get("input_ids")
        tokens = arguments["inputs_embeds"][..., 0] if tokens is None else tokens
        backend = self._parts.text_model.config._attn_implementation  # type: ignore[union-attr]
        whole = backend == "sdpa" and (mask is None or (not isinstance(mask, dict) and bool(mask.all())))
        return Blocks(torch.full(tokens.shape, 0 if whole else -1, device=tokens.device), within_window=False)
