"""The shape of a decoder, from its config."""

from __future__ import annotations

from typing import Any

from vtprune.budget import Geometry, VisionGeometry
from vtprune.hooks.windows import layer_windows

__all__ = ["decoder_geometry"]


def decoder_geometry(
    family: str,
    text: Any,
    visual_tokens: int,
    *,
    vision: VisionGeometry | None = None,
    dynamic: bool = False,
    rotary_axes: int = 1,
) -> Geometry:
    """Geometry of a decoder, from its config.

    Raises:
        UnsupportedModelError: if a layer neither slides nor attends to everything.
    """
    heads = text.num_attention_heads
    return Geometry(
        family=family,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=text.intermediate_size,
        visual_tokens=visual_tokens,
        vision=vision,
        dynamic=dynamic,
        rotary_axes=rotary_axes,
        windows=layer_windows(family, text),
    )
