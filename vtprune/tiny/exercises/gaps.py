"""Fine location: small rings with a gap a few pixels wide, and closed rings as clutter."""

from __future__ import annotations

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.exercises.base import (
    GAPS,
    WRITTEN,
    Box,
    Exercise,
    Thing,
    dye,
    finish,
    look,
    pick,
    place,
    scatter_clutter,
    stamp,
)
from vtprune.tiny.questions import LAST_PROMPT_TOKEN, LOOK_AT, Draft, Read

KINDS = ("gap",)
_SIZES = (15, 17)
_HOLE, _HALF_GAP = 0.5, 0.32
_SUPERSAMPLING = 4


def ring_mask(size: int, gap: str) -> np.ndarray:
    """[size, size] float32 coverage of a ring that is open at its "top", "bottom", "left" or "right"."""
    axis = (np.arange(size * _SUPERSAMPLING) + 0.5) / (size * _SUPERSAMPLING) * 2 - 1
    down, right = axis[:, None], axis[None, :]
    along, across = (down, right) if gap in ("top", "bottom") else (right, down)
    sign = -1 if gap in ("top", "left") else 1
    radius = np.hypot(down, right)
    inside = (radius <= 1) & (radius >= _HOLE) & ~((along * sign > 0) & (abs(across) < _HALF_GAP))
    blocks = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return blocks.mean((1, 3)).astype(np.float32)


def gaps(rng: np.random.Generator, split: str) -> Exercise:
    """One picture with 4 to 6 open rings, each in a colour of its own."""
    image = sprites.background(rng, split)
    colors = [WRITTEN[index] for index in rng.permutation(len(WRITTEN))]
    taken: list[Box] = []
    things: list[Thing] = []
    drafts: list[Draft] = []
    for color in colors[: int(rng.integers(4, 7))]:
        size, gap = pick(rng, _SIZES), pick(rng, GAPS)
        box = place(rng, size, size, taken, 3)
        if box is None:
            continue
        taken.append(box)
        stamp(image, ring_mask(size, gap), box, dye(rng, color))
        reads = (Read(LAST_PROMPT_TOKEN, 1 << len(things), LOOK_AT),)
        things.append(Thing(len(things), 0, box, look(f"gap {gap}")))
        drafts.append(Draft(f"where is the gap of the {color} ring?", gap, "gap", reads))
    scatter_clutter(rng, image, taken, int(rng.integers(6, 10)), ("ring", "bar", "diamond"))
    return Exercise(finish(rng, image)[None], False, tuple(things), tuple(drafts))
