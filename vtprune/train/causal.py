"""Answers that are forced behind a prompt must not be seen before it is their turn."""

from __future__ import annotations

from typing import Any

import torch

from vtprune.errors import UnsupportedModelError
from vtprune.train.encoding import Encoded

__all__ = ["require_causal"]


@torch.no_grad()
def require_causal(model: Any, batch: Encoded) -> None:
    """Change the last token of each answer, and see whether anything in front of it notices.

    Args:
        model: not pruned, in eval mode.
        batch: encoded with answers.

    Raises:
        UnsupportedModelError: if something does, as in models whose prompt attends in both directions.
    """
    ids = batch.inputs["input_ids"]
    other = ids.clone()
    # a word of the prompt's own, so that it is no placeholder
    other[:, -1] = torch.where(ids[:, -1] == ids[:, -2], ids[:, -3], ids[:, -2])
    first = model(**batch.inputs, use_cache=False).logits[:, :-1]
    second = model(**{**batch.inputs, "input_ids": other}, use_cache=False).logits[:, :-1]
    if not torch.equal(first, second):
        raise UnsupportedModelError(
            f"tokens of {type(model).__name__} see the answer that is forced behind the prompt before it is their "
            "turn (its prompt attends in both directions), so nothing can be learned from how well it is predicted. "
            "Train on a model whose text is causal."
        )
