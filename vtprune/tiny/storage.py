"""Weights in a quarter of their fp32 size: int8 rows with a scale each, in compressed safetensors.

A row is one output of a matrix or filter; its largest weight becomes 127. Vectors (norms, biases) stay fp16.

A checkpoint may also be stored as a change of another one: two thin factors for each of its matrices, in fewer levels.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHANGE_FILE", "FILE", "apply_change", "read_weights", "round_rows", "write_weights"]

FILE = "model.int8.safetensors.gz"
CHANGE_FILE = "change.int4.safetensors.gz"
CHANGE_LEVELS = 7
DOWN, UP, ROWS = ".down", ".up", ".rows"
_SCALE = ".int8_scale"


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Round `weights` and write them to `path`; the same weights give the same bytes.

    Factors of a change get CHANGE_LEVELS levels to either side of zero, which compression then makes use of.
    """
    import torch
    from safetensors.torch import save

    stored: dict[str, Tensor] = {}
    for name, weight in sorted(weights.items()):
        if weight.ndim < 2:
            stored[name] = weight.half()
            continue
        values, scale = _rounded(weight, CHANGE_LEVELS if name.endswith((DOWN, UP)) else 127)
        stored[name] = values.to(torch.int8).reshape(weight.shape)
        stored[name + _SCALE] = scale[:, 0]
    path.write_bytes(gzip.compress(save(stored), mtime=0))


def round_rows(weight: Tensor, levels: int) -> Tensor:
    """`weight` as it comes back when it was stored in so many levels to either side of zero."""
    values, scale = _rounded(weight, levels)
    return (values * scale).view_as(weight)


def _rounded(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(whole numbers [rows, -1], scale [rows, 1])."""
    rows = weight.float().reshape(_rows(weight), -1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / levels
    return (rows / scale).round(), scale


def read_weights(path: Path) -> dict[str, Tensor]:
    """What `write_weights` wrote, as fp32."""
    from safetensors.torch import load

    stored = load(gzip.decompress(path.read_bytes()))
    weights: dict[str, Tensor] = {}
    for name, weight in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        value = weight.float()
        weights[name] = value if scale is None else (value.reshape(len(scale), -1) * scale[:, None]).view_as(value)
    return weights


def apply_change(base: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint that is stored as a change of `base`.

    `change` holds, by the name of a weight and one of three endings: DOWN [rank, in] and UP [rank, out], whose product
    is added to the matrix, or ROWS, which are appended to it.
    """
    import torch

    weights = dict(base)
    for name, value in change.items():
        if name.endswith(ROWS):
            target = name.removesuffix(ROWS)
            weights[target] = torch.cat([base[target], value])
        elif name.endswith(UP):
            target = name.removesuffix(UP)
            weights[target] = base[target] + (value.T @ change[target + DOWN]).view_as(base[target])
    return weights


def _rows(weight: Tensor) -> int:
    """A table of positions may carry a leading axis of one."""
    return weight.shape[0] if weight.shape[0] > 1 else weight.shape[1]
