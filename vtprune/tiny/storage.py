"""Weights in a quarter of their fp32 size: int8 rows with a scale each, in compressed safetensors.

A row is one output of a matrix or filter; its largest weight becomes 127. Vectors (norms, biases) stay fp16.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILE", "read_weights", "write_weights"]

FILE = "model.int8.safetensors.gz"
_SCALE = ".int8_scale"


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Round `weights` and write them to `path`; the same weights give the same bytes."""
    import torch
    from safetensors.torch import save

    stored: dict[str, Tensor] = {}
    for name, weight in sorted(weights.items()):
        if weight.ndim < 2:
            stored[name] = weight.half()
            continue
        rows = weight.float().reshape(_rows(weight), -1)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        stored[name] = (rows / scale).round().to(torch.int8).reshape(weight.shape)
        stored[name + _SCALE] = scale[:, 0]
    path.write_bytes(gzip.compress(save(stored), mtime=0))


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


def _rows(weight: Tensor) -> int:
    """A table of positions may carry a leading axis of one."""
    return weight.shape[0] if weight.shape[0] > 1 else weight.shape[1]
