"""Gemma 3: pooled SigLIP features, layers with a sliding window between full ones, images that see themselves whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vtprune.budget import Geometry
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Parts
from vtprune.hooks.families.square import SquareFamily, check_types, encoder_geometry, encoder_tower, patches_a_side
from vtprune.hooks.units import Unit, raster
from vtprune.hooks.windows import Blocks
from vtprune.layout import ImageGrid


def _pooled(config: Any) -> int:
    """Patches along one side of the square that is pooled to a token."""
    return patches_a_side(config) // math.isqrt(config.mm_tokens_per_image)


@FAMILIES.register("gemma3")
class Gemma3(SquareFamily):
    """`Gemma3ForConditionalGeneration`: one square grid an image, pooled from the tower's patches.

    With pan and scan the processor adds crops of an image; to the model each of them is an image. The tokens of an
    image see each other in both directions, in sliding layers as far back as the window reaches.
    """

    name = "gemma3"
    model_types = ("gemma3",)
    summary = "Gemma3ForConditionalGeneration (sliding and full layers, two-way image attention; a crop is an image)"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        check_types(config, ("gemma3_text",), ("siglip_vision_model",))
        text, tower = config.text_config, config.vision_config
        if text.use_bidirectional_attention:
            raise UnsupportedModelError(
                "gemma3 with text_config.use_bidirectional_attention=True is not supported; supported: False."
            )
        widths = (tower.hidden_size, text.hidden_size)
        vision = encoder_geometry(config, tower.num_hidden_layers - 1, widths, cell=_pooled(config) ** 2)
        shape = decoder_geometry(cls.name, text, config.mm_tokens_per_image, vision=vision)
        # rotary tables differ by layer type, so positions cannot be renumbered even where no layer slides
        return dataclasses.replace(shape, windows=shape.windows or (None,) * shape.layers)

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        # the projector pools before it maps row by row
        tower = encoder_tower(root, entrance=root.multi_modal_projector.mm_soft_emb_norm)
        return dataclasses.replace(super().find_parts(root), ready_masks=True, tower=tower)

    def side(self) -> int:
        """See `SquareFamily.side`."""
        return math.isqrt(self.config.mm_tokens_per_image)

    def unit(self, grid: ImageGrid) -> Unit:
        """See `Family.unit`."""
        side = patches_a_side(self.config)
        return raster(side, side, _pooled(self.config))

    def blocks(self, arguments: Mapping[str, Any]) -> Blocks | None:
        """See `Family.blocks`."""
        from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

        types = arguments.get("token_type_ids")
        return None if types is None else Blocks(get_block_sequence_ids_for_mask(types), within_window=True)
