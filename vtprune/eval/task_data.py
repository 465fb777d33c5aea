"""Questions and scoring of the bundled lmms-eval tasks; the YAML files under `tasks/` point here.

A task is a fixed, seeded list of questions. It is ordered so that any prefix (`--limit`) spreads over as many
images as possible: first one question of every image, then a second one, and so on.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from vtprune.tiny.scenes import Question

__all__ = [
    "asked_now",
    "doc_to_messages",
    "doc_to_text",
    "doc_to_visual",
    "easy_vqa_docs",
    "mean_over_kinds",
    "normalise",
    "process_results",
    "question_docs",
    "question_seed",
    "scenes_docs",
]

IMAGES = 250
QUESTIONS_PER_IMAGE = 4
_ASKED: ContextVar[tuple[str, int]] = ContextVar("question_seed", default=("test", 0))

_YES_NO = frozenset({"yes", "no"})
_SHAPES = frozenset({"circle", "rectangle", "triangle"})

Doc = dict[str, Any]
Pictures = Sequence[tuple["Image.Image | Sequence[Image.Image]", "list[Question]"]]


def _easy_kind(answer: str) -> str:
    return "yes/no" if answer in _YES_NO else "shape" if answer in _SHAPES else "color"


def _encoded(image: Image.Image) -> Doc:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def question_docs(pictures: Pictures, kind_of: Callable[[Question], str]) -> Dataset:
    """One row a question, the n-th questions of all images before the (n+1)-th.

    Where a question has several pictures, or the frames of a film, the column `image` is a list.
    """
    import datasets

    encoded = [
        [_encoded(one) for one in image] if isinstance(image, Sequence) else _encoded(image) for image, _ in pictures
    ]
    rows = []
    for turn in range(max((len(questions) for _, questions in pictures), default=0)):
        for place, (_, questions) in enumerate(pictures):
            if turn < len(questions):
                question = questions[turn]
                rows.append(
                    {
                        "question_id": f"{question.image_id}-{turn}",
                        "image_id": question.image_id,
                        "question": question.question,
                        "answer": question.answer,
                        "kind": kind_of(question),
                        "image": encoded[place],
                    }
                )
    text = datasets.Value("string")
    names = ("question_id", "image_id", "question", "answer", "kind")
    shown = [datasets.Image()] if isinstance(encoded[0], list) else datasets.Image()
    features = datasets.Features({**dict.fromkeys(names, text), "image": shown})
    return datasets.Dataset.from_list(rows, features=features)


def asked_now() -> tuple[str, int]:
    """(split, seed) of the questions that tasks loaded now ask."""
    return _ASKED.get()


@contextmanager
def question_seed(seed: int, split: str = "test") -> Iterator[None]:
    """Tasks loaded inside the block ask the questions of this seed; 0 is what plain lmms-eval asks.

    What is chosen by questions (a layer, a plan) is chosen on those of the split "dev", which share no image with the
    test split.
    """
    token = _ASKED.set((split, seed))
    try:
        yield
    finally:
        _ASKED.reset(token)


def scenes_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_scenes`: generated scenes, test split unless told otherwise."""
    from vtprune.tiny.scenes import scene_questions

    # offset 1: seed 0 of the test split belongs to the model card of the embedded model
    split, seed = _ASKED.get()
    pictures = scene_questions(split, IMAGES, seed + 1, QUESTIONS_PER_IMAGE)
    return question_docs(pictures, lambda question: question.kind)


def easy_vqa_docs(_stub: Dataset) -> Dataset:
    """`process_docs` of `vtp_easy_vqa`: the test images of the installed `easy-vqa` package."""
    from vtprune.tiny.easy_vqa import easy_vqa_questions

    # offset 1: the generator leaves seed 0 unshuffled, and the package groups the questions of an image by type
    split, seed = _ASKED.get()
    pictures = easy_vqa_questions(split, IMAGES, seed + 1, QUESTIONS_PER_IMAGE)
    return question_docs(pictures, lambda question: _easy_kind(question.answer))


def doc_to_visual(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> list[Image.Image]:
    """The image of a question, or its images."""
    images = doc["image"] if isinstance(doc["image"], list) else [doc["image"]]
    return [image.convert("RGB") for image in images]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The question between the pre- and post-prompt of the YAML file."""
    prompts = lmms_eval_specific_kwargs or {}
    return f"{prompts.get('pre_prompt', '')}{doc['question']}{prompts.get('post_prompt', '')}"


def doc_to_messages(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> list[Doc]:
    """One user turn: the images, then the question."""
    content: list[Doc] = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    content.append({"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)})
    return [{"role": "user", "content": content}]


def normalise(answer: str) -> str:
    """Lower case, punctuation dropped, runs of spaces joined; nothing else is forgiven."""
    return " ".join(re.sub(r"[^\w\s]", " ", answer.lower()).split())


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Exact match of the whole normalised answer, and the same with its kind for `mean_over_kinds`."""
    score = float(normalise(results[0]) == normalise(doc["answer"]))
    return {"acc": score, "acc_mean_over_kinds": {"kind": doc["kind"], "score": score}}


def mean_over_kinds(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the kinds of question of each kind's accuracy."""
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        scores[item["kind"]].append(item["score"])
    return sum(sum(group) / len(group) for group in scores.values()) / len(scores)
