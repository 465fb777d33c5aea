"""Reading: colour words written in inks that mostly contradict them, among clutter."""

from __future__ import annotations

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.exercises.base import WRITTEN, Box, Exercise, Thing, dye, finish, look, place, scatter_clutter, stamp
from vtprune.tiny.exercises.lettering import lettering
from vtprune.tiny.questions import LAST_PROMPT_TOKEN, LOOK_AT, Draft, Read

KINDS = ("read", "ink")
_GAP = 4


def words(rng: np.random.Generator, split: str) -> Exercise:
    """One picture with 3 to 5 words; no text and no ink occurs twice."""
    image = sprites.background(rng, split)
    texts = [WRITTEN[index] for index in rng.permutation(len(WRITTEN))]
    inks = [WRITTEN[index] for index in rng.permutation(len(WRITTEN))]
    taken: list[Box] = []
    things: list[Thing] = []
    drafts: list[Draft] = []
    for text, ink in list(zip(texts, inks, strict=True))[: int(rng.integers(3, 6))]:
        mask = lettering(text)
        box = place(rng, mask.shape[0], mask.shape[1], taken, _GAP)
        if box is None:
            continue
        taken.append(box)
        stamp(image, mask, box, dye(rng, ink))
        reads = (Read(LAST_PROMPT_TOKEN, 1 << len(things), LOOK_AT),)
        things.append(Thing(len(things), 0, box, look(text), is_long=True))
        drafts.append(Draft(f"what does the {ink} word say?", text, "read", reads))
        drafts.append(Draft(f"what color is the word {text}?", ink, "ink", reads))
    scatter_clutter(rng, image, taken, int(rng.integers(4, 8)))
    order = rng.permutation(len(drafts))
    return Exercise(finish(rng, image)[None], False, tuple(things), tuple(drafts[index] for index in order))
