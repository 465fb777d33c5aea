"""What a decoder's queries see beside all earlier tokens: windows that slide, blocks that look ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtprune.errors import UnsupportedModelError

__all__ = ["Blocks", "layer_windows"]

_KINDS = {"full_attention": False, "sliding_attention": True}  # layer type of the host: it slides


@dataclass(frozen=True)
class Blocks:
    """Runs of tokens that see each other in both directions: an image, or a prompt before its answer.

    Attributes:
        ids: [B, T] the block of each position from the start of the conversation, -1 where a token is in none; also
            behind T there is none.
        within_window: in a sliding layer a token sees no further back in its block than the window; else the whole
            block.
    """

    ids: Tensor
    within_window: bool


def layer_windows(family: str, text: Any) -> tuple[int | None, ...]:
    """The sliding window of each decoder layer, None where it sees everything; () if no layer slides.

    Args:
        family: its name, for messages.
        text: config of the decoder.

    Raises:
        UnsupportedModelError: if a layer neither slides nor attends to everything.
    """
    window, layers = getattr(text, "sliding_window", None), text.num_hidden_layers
    # the host's caches read a config without layer types the same way
    default = ["full_attention" if window is None else "sliding_attention"] * layers
    types = getattr(text, "layer_types", None) or default
    unknown = sorted(set(types) - set(_KINDS))
    if unknown:
        raise UnsupportedModelError(
            f"{family} with decoder layers of the kind {', '.join(unknown)} is not supported; supported: "
            f"{', '.join(_KINDS)}."
        )
    windows = tuple(window if _KINDS[kind] else None for kind in types)
    return windows if any(w is not None for w in windows) else ()
