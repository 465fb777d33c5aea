"""Exercises that ask more of a reader than scenes do: words, gaps, pairs of pictures and short films.

An exercise is a pure function of (task, split, seed, index): each draws from its own generator,
`numpy.random.default_rng([seed, split number, index, stream])`, whose stream number no scene and no other task uses.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vtprune.errors import UnknownNameError
from vtprune.tiny.exercises import films, gaps, pairs, words
from vtprune.tiny.exercises.base import Exercise
from vtprune.tiny.scenes import Question, generator

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["KINDS", "NEW_WORDS", "TASKS", "Exercise", "exercise", "exercise_questions"]

_MAKERS = {"words": words.words, "gaps": gaps.gaps, "pairs": pairs.pairs, "films": films.films}
# scenes use the streams 0, 1 and 2
_FIRST_STREAM = 10
TASKS = tuple(_MAKERS)
KINDS = {"words": words.KINDS, "gaps": gaps.KINDS, "pairs": pairs.KINDS, "films": films.KINDS}
# words of questions and answers that scenes do not use, in the order of their ids behind those of a model
NEW_WORDS = (
    *("word", "say", "gap", "ring", "has", "more", "first", "second", "both", "neither"),
    *("way", "move", "up", "down", "appears", "disappears"),
)


def exercise(task: str, split: str, seed: int, index: int) -> Exercise:
    """The exercise of this number.

    Args:
        task: one of TASKS.
        split: "train", "dev" or "test"; they share no random stream and no ground texture.
        seed: other seeds give other exercises of the same split.
        index: from 0.

    Raises:
        UnknownNameError: if there is no such task.
        ValueError: if `split` is unknown.
    """
    if task not in _MAKERS:
        raise UnknownNameError("exercise", task, TASKS)
    stream = _FIRST_STREAM + TASKS.index(task)
    return _MAKERS[task](generator(split, seed, index, stream), split)


def exercise_questions(
    task: str, split: str, images: int, seed: int = 0, per_image: int = 8, without: Collection[str] = ()
) -> list[tuple[list[Image.Image], list[Question]]]:
    """The first `images` exercises of a split, with up to `per_image` questions each of all kinds but those `without`.

    Returns:
        (the pictures of an exercise, or the frames of its film; its questions) in index order.
    """
    from PIL import Image

    result = []
    for index in range(images):
        made = exercise(task, split, seed, index)
        name = f"{task}-{split}-{seed}-{index}"
        drafts = [draft for draft in made.drafts if draft.kind not in without][:per_image]
        asked = [Question(name, draft.question, draft.answer, draft.kind) for draft in drafts]
        result.append(([Image.fromarray(frame) for frame in made.frames], asked))
    return result
