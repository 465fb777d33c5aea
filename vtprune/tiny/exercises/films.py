"""Short films: a thing moves, another appears or disappears."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.exercises.base import (
    CHANGES,
    WAYS,
    WRITTEN,
    Box,
    Exercise,
    Thing,
    dye,
    finish,
    look,
    pick,
    place,
    stamp,
)
from vtprune.tiny.questions import LAST_PROMPT_TOKEN, LOOK_AT, Draft, Read
from vtprune.tiny.vocabulary import SHAPES

KINDS = ("motion", "change")
FILM_SIZE, FILM_FRAMES = 80, 8
_SIZES = (17, 19)
_SPEED = 4
_STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class _Actor(NamedTuple):
    """A shape that moves one of WAYS, does one of CHANGES at frame `cue`, or stays (deed "")."""

    shape: str
    color: str
    size: int
    variant: int
    deed: str
    cue: int

    def sweep(self) -> tuple[int, int]:
        """(height, width) of the box that holds it at all times."""
        far = _SPEED * (FILM_FRAMES - 1)
        down, right = _STEPS.get(self.deed, (0, 0))
        return self.size + far * abs(down), self.size + far * abs(right)

    def box(self, frame: int, swept: Box) -> Box | None:
        """Where it is in a frame, None if it is not there."""
        if self.deed in CHANGES and (frame >= self.cue) != (self.deed == "appears"):
            return None
        down, right = _STEPS.get(self.deed, (0, 0))
        late = FILM_FRAMES - 1 - frame
        return Box(
            swept.top + _SPEED * (frame if down > 0 else late if down else 0),
            swept.left + _SPEED * (frame if right > 0 else late if right else 0),
            self.size,
            self.size,
        )


def _cast(rng: np.random.Generator) -> list[_Actor]:
    """Two that move, one of them perhaps not, and one that appears or disappears; all shapes and colours differ."""
    shapes = [SHAPES[index] for index in rng.permutation(len(SHAPES))]
    colors = [WRITTEN[index] for index in rng.permutation(len(WRITTEN))]
    deeds = [pick(rng, WAYS), pick(rng, WAYS) if rng.random() < 0.7 else "", pick(rng, CHANGES)]
    return [
        _Actor(
            shape, color, pick(rng, _SIZES), int(rng.integers(sprites.variants(shape))), deed, int(rng.integers(2, 7))
        )
        for shape, color, deed in zip(shapes, colors, deeds, strict=False)
    ]


def films(rng: np.random.Generator, split: str) -> Exercise:
    """8 frames of 80 px with up to three shapes that never touch."""
    ground = sprites.background(rng, split)[:FILM_SIZE, :FILM_SIZE]
    taken: list[Box] = []
    stage: list[tuple[_Actor, Box, np.ndarray]] = []
    for actor in _cast(rng):
        swept = place(rng, *actor.sweep(), taken, 2, FILM_SIZE)
        if swept is not None:
            taken.append(swept)
            stage.append((actor, swept, dye(rng, actor.color)))
    frames = []
    things: list[Thing] = []
    for frame in range(FILM_FRAMES):
        image = ground.copy()
        for number, (actor, swept, paint) in enumerate(stage):
            box = actor.box(frame, swept)
            if box is not None:
                stamp(image, sprites.shape_mask(actor.shape, actor.size, actor.variant), box, paint)
                label = f"moves {actor.deed}" if actor.deed in WAYS else actor.deed
                things.append(Thing(number, frame, box, look(label)))
        frames.append(finish(rng, image))
    drafts = []
    for number, (actor, _, _) in enumerate(stage):
        reads = (Read(LAST_PROMPT_TOKEN, 1 << number, LOOK_AT),)
        if actor.deed in WAYS:
            drafts.append(Draft(f"which way does the {actor.shape} move?", actor.deed, "motion", reads))
        elif actor.deed:
            drafts.append(Draft(f"which shape {actor.deed}?", actor.shape, "change", reads))
    return Exercise(np.stack(frames), True, tuple(things), tuple(drafts))
