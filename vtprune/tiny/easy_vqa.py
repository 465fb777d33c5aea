"""easy-VQA questions (the images of the installed `easy-vqa` package) in the shape of `scene_questions`.

train = the training images but the last 400, dev = the last 400 training images, test = the official test set.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtprune.tiny.scenes import Question
from vtprune.tiny.sprites import SPLITS

if TYPE_CHECKING:
    from PIL import Image

DEV_IMAGES = 400


@lru_cache(maxsize=2)
def _part(part: str) -> tuple[Path, list[list[tuple[str, str]]]]:
    """(folder, question-answer pairs by image) of the package's "train" or "test" part."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy_vqa_questions needs the easy-vqa package. Run `pip install easy-vqa`.") from error
    folder = Path(easy_vqa.__file__).parent / "data" / part
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    by_image: list[list[tuple[str, str]]] = [[] for _ in range(max(row[2] for row in rows) + 1)]
    for question, answer, image in rows:
        by_image[image].append((question, answer))
    return folder, by_image


def image_numbers(split: str) -> range:
    """The package's own image numbers that belong to a split.

    Raises:
        ValueError: if `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    count = len(_part("test" if split == "test" else "train")[1])
    return {"train": range(count - DEV_IMAGES), "dev": range(count - DEV_IMAGES, count), "test": range(count)}[split]


def easy_vqa_questions(
    split: str, images: int, seed: int = 0, per_image: int = 8
) -> list[tuple[Image.Image, list[Question]]]:
    """`images` pictures of a split (all, if it has fewer) with up to `per_image` of their questions.

    Args:
        split: "train", "dev" or "test".
        images: how many pictures.
        seed: 0 keeps the package's order of pictures and questions, any other seed shuffles both.
        per_image: questions kept of each picture.

    Returns:
        (RGB image of 64x64 px, its questions); the same call gives the same result.
    """
    from PIL import Image

    numbers = np.array(image_numbers(split))
    folder, by_image = _part("test" if split == "test" else "train")
    rng = np.random.default_rng(seed)
    if seed:
        numbers = rng.permutation(numbers)
    result = []
    for number in numbers[:images]:
        pairs = by_image[number]
        order = rng.permutation(len(pairs)) if seed else range(len(pairs))
        image_id = f"easy-{split}-{number}"
        chosen = [pairs[place] for place in list(order)[:per_image]]
        questions = [Question(image_id, question, answer, "easy") for question, answer in chosen]
        result.append((Image.open(folder / "images" / f"{number}.png").convert("RGB"), questions))
    return result
