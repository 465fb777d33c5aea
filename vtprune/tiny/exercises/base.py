"""What all exercises are made of: pictures or the frames of a film, what stands in them, and questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.questions import Draft
from vtprune.tiny.vocabulary import ASKED_COLORS, CLUTTER, COLORS, IMAGE_SIZE, PALETTE

GAPS = ("top", "bottom", "left", "right")
WAYS = ("up", "down", "left", "right")
CHANGES = ("appears", "disappears")
# words that may be written: the colours, so that the ink of a word can contradict it
WRITTEN = COLORS[:ASKED_COLORS]
# what a tower must tell apart that scenes never asked of it; 0 is everything else
LOOKS = ("", *WRITTEN, *(f"gap {side}" for side in GAPS), *(f"moves {way}" for way in WAYS), *CHANGES)

_RGB = {name: np.array(value, np.float32) for name, value in PALETTE.items()}


class Box(NamedTuple):
    """Pixels from `top` and `left` on."""

    top: int
    left: int
    height: int
    width: int

    def overlaps(self, other: Box, gap: int = 0) -> bool:
        """Whether fewer than `gap` pixels lie between the two."""
        return (
            self.top < other.top + other.height + gap
            and other.top < self.top + self.height + gap
            and self.left < other.left + other.width + gap
            and other.left < self.left + self.width + gap
        )


class Thing(NamedTuple):
    """Something that a question may be about, in one picture or frame.

    number: bit of the thing in a `Read`; the same in every frame of a film.
    frame: in which picture or frame.
    box: where.
    look: index into LOOKS.
    is_long: it spans several visual tokens, all of which are needed.
    """

    number: int
    frame: int
    box: Box
    look: int = 0
    is_long: bool = False


@dataclass(frozen=True)
class Exercise:
    """Pictures with the questions about them.

    Attributes:
        frames: [N, H, W, 3] uint8; N pictures, or the N frames of one film.
        is_film: which of the two.
        things: what stands where.
        drafts: questions with answers, and where a reader must look.
    """

    frames: np.ndarray
    is_film: bool
    things: tuple[Thing, ...]
    drafts: tuple[Draft, ...]


def look(name: str) -> int:
    """Index of a name in LOOKS."""
    return LOOKS.index(name)


def pick(rng: np.random.Generator, items):
    """One of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


def place(
    rng: np.random.Generator, height: int, width: int, taken: list[Box], gap: int, side: int = IMAGE_SIZE
) -> Box | None:
    """A box that keeps `gap` pixels from those taken, or None after 60 tries."""
    for _ in range(60):
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        box = Box(top, left, height, width)
        if not any(box.overlaps(other, gap) for other in taken):
            return box
    return None


def dye(rng: np.random.Generator, color: str) -> np.ndarray:
    """[3] float32 RGB, a little off the palette's."""
    return _RGB[color] + rng.uniform(-18, 18, 3).astype(np.float32)


def stamp(image: np.ndarray, mask: np.ndarray, box: Box, paint: np.ndarray) -> None:
    """Lay `paint` [3] over `image` where `mask` [height, width] in 0..1 covers it."""
    region = image[box.top : box.top + box.height, box.left : box.left + box.width]
    region += mask[..., None] * (paint - region)


def scatter_clutter(
    rng: np.random.Generator, image: np.ndarray, taken: list[Box], count: int, kinds: tuple[str, ...] = CLUTTER
) -> None:
    """Up to `count` pieces of clutter in the colours that nothing asks about, clear of what is taken."""
    for _ in range(count):
        size = int(rng.choice(sprites.CLUTTER_SIZES))
        box = place(rng, size, size, taken, 1, len(image))
        kind, color = pick(rng, kinds), pick(rng, COLORS[ASKED_COLORS:])
        mask = sprites.shape_mask(kind, size, int(rng.integers(sprites.variants(kind))))
        if box is not None:
            taken.append(box)
            stamp(image, mask, box, dye(rng, color))


def finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Sensor noise, and uint8."""
    noise = rng.standard_normal((*image.shape[:2], 1), dtype=np.float32) * 3
    return np.clip(image + noise, 0, 255).astype(np.uint8)
