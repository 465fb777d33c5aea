"""Synthetic scenes: freely placed shapes and framed handwritten digits among clutter, on textured ground.

A scene is a pure function of (split, seed, index): the layout, the painting and the questions each draw from
their own generator, `numpy.random.default_rng([seed, split number, index, stream])`, so that a layout does not
depend on whether it is painted. Image `index` runs 0, 1, 2, ... in the order in which `scene_questions` returns.
Train, dev and test share no handwritten digit, no ground texture and no random stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.vocabulary import ASKED_COLORS, ASKED_KINDS, CLUTTER, COLORS, IMAGE_SIZE, KINDS, PALETTE, SHAPES

if TYPE_CHECKING:
    from PIL import Image

THIRD = IMAGE_SIZE / 3
_RGB = np.array([PALETTE[color] for color in COLORS], np.float32)
_LAYOUT, _PAINT, _ASK = range(3)
_TRIES = 40


@dataclass(frozen=True)
class Question:
    """One question with its one right answer; `kind` is a name of `questions.KINDS_OF_QUESTION` or "easy"."""

    image_id: str
    question: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One thing in a scene: `kind` and `color` index KINDS and COLORS; top/left/size in pixels."""

    kind: int
    color: int
    top: int
    left: int
    size: int
    variant: int

    @property
    def askable(self) -> bool:
        """False for clutter, which no question names."""
        return self.kind < ASKED_KINDS

    @property
    def is_digit(self) -> bool:
        """True for a handwritten digit in a coloured frame."""
        return len(SHAPES) <= self.kind < ASKED_KINDS

    @property
    def center(self) -> tuple[float, float]:
        """(y, x) in pixels."""
        return self.top + self.size / 2, self.left + self.size / 2

    @property
    def row(self) -> int:
        """Third of the image the centre lies in: 0 top, 1 middle, 2 bottom."""
        return min(2, int(self.center[0] / THIRD))

    @property
    def column(self) -> int:
        """Third of the image the centre lies in: 0 left, 1 center, 2 right."""
        return min(2, int(self.center[1] / THIRD))

    @property
    def margin(self) -> float:
        """Pixels from the centre to the nearest border between thirds."""
        return min(abs(axis - border) for axis in self.center for border in (THIRD, 2 * THIRD))


def generator(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    """The random generator of one image and one purpose.

    Raises:
        ValueError: if `split` is unknown.
    """
    if split not in sprites.SPLITS:
        raise ValueError(f"split must be one of {', '.join(sprites.SPLITS)}, got {split!r}.")
    return np.random.default_rng([seed, sprites.SPLITS.index(split), index, stream])


def scene_objects(split: str, seed: int, index: int, *, dense: bool = False) -> list[SceneObject]:
    """What stands where: 7-10 askable objects (11-14 when `dense`, more digits) and 10-13 pieces of clutter.

    One shape and one colour are favoured per scene, so that look-alikes occur. No two boxes touch (2 px gap,
    1 px around clutter); what finds no room in 40 tries is left out, largest first.
    """
    rng = generator(split, seed, index, _LAYOUT)
    wanted = _askable(rng, dense)
    for _ in range(int(rng.integers(10, 14))):
        kind = ASKED_KINDS + int(rng.integers(len(CLUTTER)))
        color = ASKED_COLORS + int(rng.integers(len(COLORS) - ASKED_COLORS))
        wanted.append((int(rng.choice(sprites.CLUTTER_SIZES)), kind, color, 1))
    wanted.sort(reverse=True)
    boxes = np.zeros((len(wanted), 4))
    objects: list[SceneObject] = []
    for size, kind, color, gap in wanted:
        corners = rng.integers(0, IMAGE_SIZE - size + 1, (_TRIES, 2))
        placed = boxes[: len(objects)]
        apart = (corners[:, None] >= placed[None, :, 2:] + gap) | (corners[:, None] + size + gap <= placed[None, :, :2])
        free = np.flatnonzero(apart.any(-1).all(-1))
        if not len(free):
            continue
        top, left = (int(value) for value in corners[free[0]])
        boxes[len(objects)] = top, left, top + size, left + size
        variant = int(rng.integers(sprites.variants(KINDS[kind])))
        objects.append(SceneObject(kind, color, top, left, size, variant))
    return objects


def _askable(rng: np.random.Generator, dense: bool) -> list[tuple[int, int, int, int]]:
    """(size, kind, colour, gap) of the objects that questions may name."""
    favoured_shape, favoured_color = int(rng.integers(len(SHAPES))), int(rng.integers(ASKED_COLORS))
    wanted = []
    for _ in range(int(rng.integers(11, 15) if dense else rng.integers(7, 11))):
        color = favoured_color if rng.random() < 0.2 else int(rng.integers(ASKED_COLORS))
        if rng.random() < (0.6 if dense else 0.38):
            ink = int(rng.choice(sprites.DIGIT_INK))
            wanted.append((ink + 2 * sprites.FRAME, len(SHAPES) + int(rng.integers(10)), color, 2))
        else:
            shape = favoured_shape if rng.random() < 0.25 else int(rng.integers(len(SHAPES)))
            wanted.append((int(rng.choice(sprites.SHAPE_SIZES)), shape, color, 2))
    return wanted


def paint(objects: list[SceneObject], split: str, seed: int, index: int) -> np.ndarray:
    """The picture of these objects, [128, 128, 3] uint8."""
    rng = generator(split, seed, index, _PAINT)
    image = sprites.background(rng, split)
    for item in objects:
        box = image[item.top : item.top + item.size, item.left : item.left + item.size]
        dye = _RGB[item.color] + rng.uniform(-18, 18, 3).astype(np.float32)
        if item.is_digit:
            samples = sprites.digit_ids(split, item.kind - len(SHAPES))
            ink = sprites.digit_ink(int(rng.choice(samples)), item.size - 2 * sprites.FRAME)[..., None]
            paper, dark = rng.uniform(225, 255), rng.uniform(0, 70)
            box[:] = dye
            inner = slice(sprites.FRAME, -sprites.FRAME)
            box[inner, inner] = paper + (dark - paper) * ink
        else:
            mask = sprites.shape_mask(KINDS[item.kind], item.size, item.variant)[..., None]
            box += mask * (dye - box)
    image += rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * 3
    return np.clip(image, 0, 255).astype(np.uint8)


def scene_questions(
    split: str, images: int, seed: int = 0, per_image: int = 8, weights: Mapping[str, float] | None = None
) -> list[tuple[Image.Image, list[Question]]]:
    """The first `images` scenes of a split with up to `per_image` different questions each.

    Args:
        split: "train", "dev" or "test".
        images: how many scenes, index 0 upward.
        seed: other seeds give other scenes of the same split.
        per_image: questions asked at most about one scene; kinds are drawn with `questions.WEIGHTS`.
        weights: other shares of the kinds; those not named are not asked.

    Returns:
        (RGB image of 128x128 px, its questions) in index order; the same call gives the same bytes anywhere.
    """
    from PIL import Image

    from vtprune.tiny.questions import KINDS_OF_QUESTION, WEIGHTS, ask

    shares = WEIGHTS if weights is None else {kind: weights.get(kind, 0.0) for kind in KINDS_OF_QUESTION}
    result = []
    for index in range(images):
        objects = scene_objects(split, seed, index)
        drafts = ask(objects, generator(split, seed, index, _ASK), per_image, shares)
        image_id = f"{split}-{seed}-{index}"
        questions = [Question(image_id, draft.question, draft.answer, draft.kind) for draft in drafts]
        result.append((Image.fromarray(paint(objects, split, seed, index)), questions))
    return result


def question_generator(split: str, seed: int, index: int) -> np.random.Generator:
    """The generator `scene_questions` asks with, for callers that need the unspoken targets as well."""
    return generator(split, seed, index, _ASK)
