"""DeepStack: visual features that the host adds again after its first decoder layers, for the tokens that are left."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtprune.errors import HostContractError
from vtprune.hooks.rows import Rows

__all__ = ["attach_deepstack"]

_METHOD = "_deepstack_process"


def attach_deepstack(text: nn.Module, pruned_rows: Callable[[], Rows | None]) -> Callable[[], object]:
    """Have `text` add its features to the rows that are left.

    Args:
        text: the text model.
        pruned_rows: the rows of the call in progress if it has dropped any, else None.

    Returns:
        what takes the effect back.

    Raises:
        HostContractError: if the host adds them elsewhere.
    """
    add = getattr(text, _METHOD, None)
    if add is None:
        raise HostContractError(
            f"{type(text).__name__} has no {_METHOD}(hidden_states, visual_pos_masks, visual_embeds), where visual "
            "features are added to early layers. Please report it with your transformers version."
        )

    @functools.wraps(add)
    def added(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        rows = pruned_rows()
        if rows is not None:
            visual_pos_masks, visual_embeds = _left(rows, visual_pos_masks, visual_embeds)
        return add(hidden_states, visual_pos_masks, visual_embeds)

    # on the instance, so that the method of the class shows again when it is taken away
    setattr(text, _METHOD, added)
    return lambda: vars(text).pop(_METHOD, None)


def _left(rows: Rows, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] visual positions and [their number, D] features -> [B, M] and the features of those that are left."""
    rows = rows.to(mask.device)
    present = torch.zeros_like(mask)
    present.scatter_(1, rows.position, rows.filled)
    return mask.gather(1, rows.position) & rows.filled, features[present[mask].to(features.device)]
