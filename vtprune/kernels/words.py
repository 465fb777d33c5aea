"""Rows as integers: what only moves needs no dtype of its own, and moves fastest in wide words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WORDS", "widest_word"]

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""The integer of each number of bytes."""


def widest_word(tensor: Tensor, row: int, strides: Sequence[int]) -> torch.dtype:
    """The widest integer in whose multiples rows of `tensor` begin, lie apart and end.

    Args:
        tensor: whose rows are contiguous.
        row: elements of a row.
        strides: of the axes in front of the rows, in elements; 0 where an axis has a single entry.
    """
    size = tensor.element_size()
    starts = (tensor.data_ptr(), tensor.storage_offset() * size)
    return WORDS[math.gcd(8, row * size, *starts, *(step * size for step in strides))]
