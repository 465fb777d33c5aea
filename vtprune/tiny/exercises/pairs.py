"""Comparing two pictures: which of them holds a thing, a thing's colour in one of them, more of a kind."""

from __future__ import annotations

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.exercises.base import (
    WRITTEN,
    Box,
    Exercise,
    Thing,
    dye,
    finish,
    pick,
    place,
    scatter_clutter,
    stamp,
)
from vtprune.tiny.questions import COUNT_OVER, LAST_PROMPT_TOKEN, LOOK_AT, LOOK_AT_NOTHING, Draft, Read
from vtprune.tiny.vocabulary import PLURALS, SHAPES

KINDS = ("which", "color_in", "more")
ORDINALS = ("first", "second")
_SIZES = (15, 17)

Item = tuple[str, str]


def _contents(rng: np.random.Generator) -> tuple[list[Item], list[Item]]:
    """(shape, colour) of what each picture shows: one or two things in both, the rest apart.

    One shape stands once in each picture, in colours of its own there; a favoured one makes the numbers differ.
    """
    single, *others = (SHAPES[index] for index in rng.permutation(len(SHAPES)))
    colors = rng.permutation(len(WRITTEN))
    shared = [(pick(rng, others), pick(rng, WRITTEN)) for _ in range(int(rng.integers(1, 3)))]
    pictures = []
    for frame in range(len(ORDINALS)):
        favoured = pick(rng, others)
        rest = [favoured if rng.random() < 0.4 else pick(rng, others) for _ in range(int(rng.integers(2, 5)))]
        pictures.append([(single, WRITTEN[colors[frame]]), *shared, *((shape, pick(rng, WRITTEN)) for shape in rest)])
    return pictures[0], pictures[1]


def pairs(rng: np.random.Generator, split: str) -> Exercise:
    """Two pictures with 4 to 7 shapes each."""
    frames = []
    things: list[Thing] = []
    shown: list[list[tuple[Item, int]]] = []
    for frame, items in enumerate(_contents(rng)):
        image = sprites.background(rng, split)
        taken: list[Box] = []
        shown.append([])
        for shape, color in items:
            size, variant = pick(rng, _SIZES), int(rng.integers(sprites.variants(shape)))
            box = place(rng, size, size, taken, 3)
            if box is None:
                continue
            taken.append(box)
            stamp(image, sprites.shape_mask(shape, size, variant), box, dye(rng, color))
            shown[-1].append(((shape, color), len(things)))
            things.append(Thing(len(things), frame, box))
        scatter_clutter(rng, image, taken, int(rng.integers(3, 7)))
        frames.append(finish(rng, image))
    drafts = [*_which(rng, shown), *_color_in(rng, shown), *_more(shown)]
    order = rng.permutation(len(drafts))
    return Exercise(np.stack(frames), False, tuple(things), tuple(drafts[index] for index in order))


def _bits(shown: list[tuple[Item, int]], shape: str, color: str | None = None) -> int:
    return sum(1 << number for item, number in shown if item[0] == shape and color in (None, item[1]))


def _which(rng: np.random.Generator, shown: list[list[tuple[Item, int]]]) -> list[Draft]:
    """Up to one question for each of the four answers."""
    holds = [{item for item, _ in picture} for picture in shown]
    answers = {
        "first": sorted(holds[0] - holds[1]),
        "second": sorted(holds[1] - holds[0]),
        "both": sorted(holds[0] & holds[1]),
        # the shape occurs and the colour occurs, not together
        "neither": sorted(
            {(shape, color) for shape, _ in holds[0] | holds[1] for _, color in holds[0] | holds[1]}
            - holds[0]
            - holds[1]
        ),
    }
    drafts = []
    for answer, items in answers.items():
        if not items:
            continue
        shape, color = pick(rng, items)
        bits = sum(_bits(picture, shape, color) for picture in shown)
        read = Read(LAST_PROMPT_TOKEN, bits, LOOK_AT if bits else LOOK_AT_NOTHING)
        drafts.append(Draft(f"which image has a {color} {shape}?", answer, "which", (read,)))
    return drafts


def _color_in(rng: np.random.Generator, shown: list[list[tuple[Item, int]]]) -> list[Draft]:
    """A shape that stands once in each picture, in two colours; asked of either picture."""
    drafts = []
    for shape in SHAPES:
        found = [[entry for entry in picture if entry[0][0] == shape] for picture in shown]
        if [len(part) for part in found] != [1, 1] or found[0][0][0] == found[1][0][0]:
            continue
        for ordinal, part in zip(ORDINALS, found, strict=True):
            (item, number), question = part[0], f"what color is the {shape} in the {ordinal} image?"
            drafts.append(Draft(question, item[1], "color_in", (Read(LAST_PROMPT_TOKEN, 1 << number, LOOK_AT),)))
    return drafts


def _more(shown: list[list[tuple[Item, int]]]) -> list[Draft]:
    drafts = []
    for shape, plural in zip(SHAPES, PLURALS, strict=True):
        bits = [_bits(picture, shape) for picture in shown]
        one, two = (part.bit_count() for part in bits)
        if one != two:
            read = Read(LAST_PROMPT_TOKEN, bits[0] + bits[1], COUNT_OVER)
            drafts.append(Draft(f"which image has more {plural}?", ORDINALS[two > one], "more", (read,)))
    return drafts
