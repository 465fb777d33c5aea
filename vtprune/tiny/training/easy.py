"""easy-VQA pictures at 128 px with the labels that scenes have.

The package has none. What a picture shows follows from its own questions and answers; where, from its pixels: grounds
are pale and shapes are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from vtprune.tiny.easy_vqa import easy_vqa_questions
from vtprune.tiny.questions import LAST_PROMPT_TOKEN, LOOK_AT, Draft, Read
from vtprune.tiny.scenes import Question
from vtprune.tiny.vocabulary import ASKED_COLORS, COLORS, IMAGE_SIZE, SHAPES

_SHAPES = SHAPES[:3]
_GROUND_LEVEL = 190
# the one object of the picture answers every question, whichever it is
_READS = (Read(LAST_PROMPT_TOKEN, 1, LOOK_AT),)


class EasyPicture(NamedTuple):
    """pixels: [128, 128, 3] uint8; cover: [128, 128] bool, the shape; kind, color: indices, None where not told."""

    pixels: np.ndarray
    cover: np.ndarray
    kind: int | None
    color: int | None
    drafts: list[Draft]


def _told(asked: Sequence[Question], names: Sequence[str]) -> int | None:
    """Index of the name that the picture shows, as far as its questions and answers tell."""
    denied: set[str] = set()
    for item in asked:
        words = set(item.question.rstrip("?").split())
        named = (words | {item.answer}) & set(names)
        is_open = item.answer not in ("yes", "no")
        if is_open or (item.answer == "yes") != bool(words & {"not", "no"}):
            if named:
                return names.index(named.pop())
        else:
            denied |= named
    left = [name for name in names if name not in denied]
    return names.index(left[0]) if len(left) == 1 else None


@lru_cache(maxsize=2)
def easy_pictures(split: str) -> list[EasyPicture]:
    """All easy-VQA pictures of a split with all their questions."""
    result = []
    for image, asked in easy_vqa_questions(split, images=10**6, per_image=10**6):
        pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
        drafts = [Draft(item.question, item.answer, "easy", _READS) for item in asked]
        cover = pixels.min(-1) < _GROUND_LEVEL
        result.append(EasyPicture(pixels, cover, _told(asked, _SHAPES), _told(asked, COLORS[:ASKED_COLORS]), drafts))
    return result
