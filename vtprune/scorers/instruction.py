"""What the instruction, the text behind the last image, attends to: a signal that several methods read."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels.attention_rows import attention_rows
from vtprune.views import AttentionView

__all__ = ["instruction_attention"]

# instruction tokens whose attention over all keys is held at once
_ROWS = 64


def instruction_attention(view: AttentionView) -> Tensor:
    """[B, V] attention that each visual token gets from the query rows of the view, mean over rows and heads, fp32."""
    total = torch.zeros(view.column.shape, dtype=torch.float32, device=view.query.device)
    asking = view.rows
    for first in range(0, view.query.shape[2], _ROWS):
        part = slice(first, first + _ROWS)
        real = view.real if view.real is None or view.real.dim() == 2 else view.real[:, part]
        weights = attention_rows(
            view.query[:, :, part], view.key, view.scaling, real=real, column=view.column, softcap=view.softcap
        )
        total += (weights if asking is None else weights * asking[:, part, None]).sum(1)
    number = view.query.shape[2] if asking is None else asking.sum(1, keepdim=True)
    return total / number
