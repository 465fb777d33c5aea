"""Questions with answers to train predictors on: generated ones, a file of JSON lines, or lmms-eval tasks."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vtprune.errors import InputError, UnknownNameError, VtpruneError
from vtprune.jsonl import DataLine, read_data_lines
from vtprune.train.encoding import Encoded, encode

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtprune.tiny.scenes import Question

__all__ = ["DATA_HELP", "Encoded", "Example", "Split", "encode", "read_data"]

Split = Literal["train", "held-out"]
DATA_HELP = (
    "embedded (generated scenes and easy-VQA, half and half), scenes, easy-vqa, lmms:TASK[,TASK], or a file of JSON "
    'lines {"image": path or [paths], "question": text, "answer": text, "kind": text (optional)}'
)
_GENERATED = ("embedded", "scenes", "easy-vqa")
# questions of generated data unless a limit is given
_DEFAULT = {"train": 8000, "held-out": 1000}
_PARTS = {"train": "train", "held-out": "dev"}
_PER_SCENE, _PER_EASY = 8, 4
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        key: says which question this is; unique in its data, the same in every process and run.
        images: pictures, or files that are opened when the example is encoded.
        kind: of question, for figures by kind; None where the data has no kinds.
    """

    key: str
    images: tuple[Image | Path, ...]
    question: str
    answer: str
    kind: str | None = None


def read_data(
    spec: str, split: Split, limit: int | None = None, seed: int = 0, *, held_out: str | Path | None = None
) -> list[Example]:
    """Training or held-out questions, in a fixed order.

    No image of the training questions is asked about in the held-out ones. Generated data has a split of its own (its
    dev split, which `vtprune eval` does not use); of a file or of tasks about a tenth is held out, whole images, drawn
    by `seed`. Tasks ask their training documents where they have some, else what `vtprune eval` would ask: then do not
    measure the result on the same task.

    Args:
        spec: `embedded`, `scenes`, `easy-vqa`, `lmms:TASK[,TASK]`, or a file of JSON lines; images are looked up
            beside the file.
        split: "train" or "held-out".
        limit: questions at most. If None, 8000 and 1000 of generated data, all of any other.
        seed: which questions, and in which order; the first n of a larger limit are those of limit n.
        held_out: file whose lines are held out, instead of a part of the file `spec`.

    Raises:
        UnknownNameError: if there is no such data.
        InputError: if an argument or a line of a file is malformed, an image file is missing, or nothing is left.
        VtpruneError: if a package is missing.
    """
    if split not in get_args(Split):
        raise UnknownNameError("split", str(split), get_args(Split))
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 question, got {limit}. Leave it out for all.")
    if seed < 0:
        raise InputError(f"seed must be >= 0, got {seed}.")
    path = Path(spec).expanduser()
    is_file = path.suffix in (".jsonl", ".json") or len(path.parts) > 1 or path.is_file()
    if held_out is not None and not is_file:
        raise InputError(f"a held-out file belongs to a file of JSON lines; {spec!r} has held-out questions already.")
    if spec in _GENERATED:
        examples = _generated(spec, split, limit or _DEFAULT[split], seed)
    elif spec.startswith("lmms:"):
        examples = _tasks(spec.removeprefix("lmms:"), split, limit, seed)
    elif is_file:
        examples = _from_files(path, None if held_out is None else Path(held_out).expanduser(), split, limit, seed)
    else:
        raise UnknownNameError("data", spec, (*_GENERATED, "lmms:TASK", "FILE.jsonl"))
    if not examples:
        raise InputError(f"{spec!r} holds no {split} question. Pass {DATA_HELP}.")
    return examples


def _generated(spec: str, split: Split, limit: int, seed: int) -> list[Example]:
    if spec == "embedded":
        halves = (_scenes(split, (limit + 1) // 2, seed), _easy(split, limit // 2, seed))
        pairs = itertools.chain.from_iterable(itertools.zip_longest(*halves))
        return [example for example in pairs if example is not None]
    return _scenes(split, limit, seed) if spec == "scenes" else _easy(split, limit, seed)


def _scenes(split: Split, limit: int, seed: int) -> list[Example]:
    try:
        from vtprune.tiny.scenes import scene_questions

        pictures = scene_questions(_PARTS[split], math.ceil(limit / _PER_SCENE), seed, _PER_SCENE)
        while sum(len(asked) for _, asked in pictures) < limit:  # a sparse scene has fewer questions
            pictures = scene_questions(_PARTS[split], len(pictures) + 1, seed, _PER_SCENE)
    except ImportError as error:
        raise _not_installed("scenes", error) from error
    return _of_pictures(pictures, limit)


def _easy(split: Split, limit: int, seed: int) -> list[Example]:
    try:
        from vtprune.tiny.easy_vqa import easy_vqa_questions

        # offset 1: the generator leaves seed 0 unshuffled
        pictures = easy_vqa_questions(_PARTS[split], math.ceil(limit / _PER_EASY), seed + 1, _PER_EASY)
    except ImportError as error:
        raise _not_installed("easy-vqa", error) from error
    return _of_pictures(pictures, limit)


def _not_installed(name: str, error: ImportError) -> VtpruneError:
    return VtpruneError(f"the data {name!r} needs a package ({error}). Run: pip install 'vtprune[train]'")


def _of_pictures(pictures: Sequence[tuple[Image, Sequence[Question]]], limit: int) -> list[Example]:
    examples = (
        Example(f"{item.image_id}: {item.question}", (image,), item.question, item.answer, item.kind)
        for image, asked in pictures
        for item in asked
    )
    # a question that is asked twice about an image counts once
    return list({example.key: example for example in itertools.islice(examples, limit)}.values())


def _from_files(path: Path, held_out: Path | None, split: Split, limit: int | None, seed: int) -> list[Example]:
    lines = list(read_data_lines(path, answers=True))
    if held_out is None:
        chosen = _share(_linked([line.images for line in lines]), split, seed, repr(str(path)))
    else:
        others = list(read_data_lines(held_out, answers=True))
        _check_apart(lines, others)
        lines = lines if split == "train" else others
        chosen = _shuffled(len(lines), seed)
    examples = []
    for line in (lines[index] for index in chosen[:limit]):
        for image in line.images:
            if not image.is_file():
                raise InputError(f"{line.where}: there is no image file {str(image)!r}.")
        digest = _digest([[str(image) for image in line.images], line.question, line.answer, line.kind])
        examples.append(Example(f"{line.number}-{digest}", line.images, line.question, line.answer, line.kind))
    return examples


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _linked(images: Sequence[tuple[Path, ...]]) -> list[str]:
    """A name for each line, the same for lines that share an image, at first hand or through others."""
    parent: dict[Path, Path] = {}

    def root(image: Path) -> Path:
        while (above := parent.setdefault(image, image)) != image:
            image = above
        return image

    for one in images:
        for other in one[1:]:
            parent[root(other)] = root(one[0])
    return [str(root(one[0])) for one in images]


def _check_apart(lines: Sequence[DataLine], others: Sequence[DataLine]) -> None:
    trained = {image.resolve(): line.where for line in lines for image in line.images}
    for line in others:
        for image in line.images:
            if image.resolve() in trained:
                raise InputError(
                    f"{line.where} asks about {str(image)!r}, and so does {trained[image.resolve()]}: held-out images "
                    "must not be trained on. Remove one of the two lines."
                )


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _share(groups: Sequence[str], split: Split, seed: int, source: str) -> list[int]:
    """Places of the questions of one split, shuffled; questions of one group (image) stay together.

    Raises:
        InputError: if there are fewer than two groups.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise InputError(
            f"{source} asks about {len(names)} image(s), so none can be held out. Pass questions about more images, or "
            "a held-out file."
        )
    random.Random(seed).shuffle(names)
    held = set(names[: max(1, round(_HELD_OUT_SHARE * len(names)))])
    return [place for place in _shuffled(len(groups), seed) if (groups[place] in held) == (split == "held-out")]


def _tasks(names: str, split: Split, limit: int | None, seed: int) -> list[Example]:
    from vtprune.eval.harness import Harness

    tasks = [name.strip() for name in names.split(",") if name.strip()]
    harness = Harness(tasks, None, seed)
    examples: list[list[Example]] = []
    for name in tasks:
        groups = harness.image_ids(name)
        chosen = _share(groups, split, seed, f"task {name!r}")
        examples.append(list(_of_task(harness, name, chosen[:limit])))
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*examples))
    return [example for example in mixed if example is not None][:limit]


def _of_task(harness: Any, name: str, places: Sequence[int]) -> Iterator[Example]:
    for asked in harness.questions_of(name, places):
        images = tuple(image.convert("RGB") for image in asked.images)
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        digest = _digest([pixels, asked.question, asked.answer])
        yield Example(f"{name}-{asked.doc_id}-{digest}", images, asked.question, asked.answer, asked.kind)
