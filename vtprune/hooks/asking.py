"""Asking a decoder layer what it would attend to, without running it.

The layer is called as the host would call it, up to the point where its attention has queries, keys and values; there
the probe reads them and breaks off. Nothing is written to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vtprune.errors import HostContractError

__all__ = ["Answered", "ask"]


class Answered(Exception):
    """The layer that was asked has shown its attention."""


@torch.no_grad()
def ask(run: Callable[[], Any], layer: int) -> None:
    """Call `run`, which must come to decoder layer `layer` and be broken off there.

    Raises:
        HostContractError: if it was not.
    """
    try:
        run()
    except Answered:
        return
    raise HostContractError(
        f"decoder layer {layer} ran without transformers' attention interface, so that nobody could read its queries "
        "and keys. Use a method that reads no attention, such as divprune or uniform."
    )
