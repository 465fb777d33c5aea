"""Questions of the bundled tasks that isolate one ability each: words, counting, fine location, pairs, films.

They are scored as the other bundled tasks are (`vtprune.eval.task_data`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vtprune.eval.task_data import IMAGES, QUESTIONS_PER_IMAGE, asked_now, doc_to_text, doc_to_visual, question_docs

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

__all__ = [
    "count_docs",
    "film_to_messages",
    "film_to_visual",
    "fine_docs",
    "pairs_docs",
    "video_docs",
    "words_docs",
]

Doc = dict[str, Any]


def _exercise_docs(task: str, without: Collection[str] = ()) -> Dataset:
    from vtprune.tiny.exercises import exercise_questions

    split, seed = asked_now()
    # offset 1: seed 0 of the test split belongs to the model card of the embedded model
    entries = exercise_questions(task, split, IMAGES, seed + 1, QUESTIONS_PER_IMAGE, without)
    alone = all(len(images) == 1 for images, _ in entries)
    return question_docs([(images[0] if alone else images, asked) for images, asked in entries], lambda q: q.kind)


def words_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_words`: what the word in an ink says."""
    # tiny:qwen2_vl_plus finds a word by its ink, and is too weak at finding an ink by the word (its model card)
    return _exercise_docs("words", without=("ink",))


def fine_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_fine`: on which side a small ring is open."""
    return _exercise_docs("gaps")


def pairs_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_pairs`: two pictures compared."""
    return _exercise_docs("pairs")


def video_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_video`: what moves where, appears or disappears in 8 frames."""
    return _exercise_docs("films")


def count_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_count`: scenes, of which only numbers are asked."""
    from vtprune.tiny.scenes import scene_questions

    split, seed = asked_now()
    pictures = scene_questions(split, IMAGES, seed + 1, QUESTIONS_PER_IMAGE, {"count": 1.0})
    return question_docs(pictures, lambda q: "count_color" if "objects" in q.question else "count_shape")


def film_to_visual(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> list[list[Image.Image]]:
    """The one film of a question, as its frames."""
    return [doc_to_visual(doc)]


def film_to_messages(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> list[Doc]:
    """One user turn: the film, then the question."""
    film = {"type": "video", "url": doc_to_visual(doc)}
    text = {"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)}
    return [{"role": "user", "content": [film, text]}]
