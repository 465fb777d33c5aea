"""What the shipped tiny LLaVA's visual tokens are made of, by label."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from vtprune.tiny import load_tiny
from vtprune.tiny.training.packing import COLOR_CLASSES, KIND_CLASSES, NO_REGION, scene_batch
from vtprune.tiny.training.vlms.llava import Llava

_SCENES, _SEED, _FIRST_SCENE = 96, 0, 50_000_000
_RIDGE = 1.0


@lru_cache(maxsize=1)
def llava_symbols() -> tuple[torch.Tensor, ...]:
    """Vectors [classes, D] by kind, colour, region, is-centre, row and column, fitted by least squares.

    A visual token of the shipped LLaVA is taken as the sum of one vector for each of its labels.
    """
    vlm = Llava()
    vlm.hf = load_tiny("llava")[0]
    side = vlm.grid.side
    sizes = (KIND_CLASSES, COLOR_CLASSES, NO_REGION + 1, 2, side, side)
    starts = np.cumsum([0, *sizes[:-1]])
    rows, columns = np.divmod(np.arange(vlm.grid.tokens), side)
    gram = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    target: torch.Tensor | None = None
    for first in range(0, _SCENES, 8):
        batch = scene_batch(vlm.grid, "train", _SEED, _FIRST_SCENE + first, 8, questions=0)
        with torch.no_grad():
            tokens = vlm.see(batch.images).flatten(0, 1).double()
        labels = batch.labels[:, [0, 1, 2, 4]]
        places = np.broadcast_to(np.stack([rows, columns]), (len(labels), 2, len(rows)))
        index = torch.from_numpy(np.concatenate([labels, places], 1) + starts[None, :, None])
        design = torch.zeros(len(tokens), sum(sizes), dtype=torch.float64)
        design.scatter_(1, index.permute(0, 2, 1).flatten(0, 1), 1.0)
        gram += design.T @ design
        target = design.T @ tokens if target is None else target + design.T @ tokens
    # labels of every token add up to the same, so the sums alone leave their split open
    fitted = torch.linalg.solve(gram + _RIDGE * torch.eye(len(gram), dtype=torch.float64), target)
    return fitted.float().split(list(sizes))
