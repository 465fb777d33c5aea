"""Exercises are repeatable, their splits share nothing, and their answers can be read off the pixels."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtprune.errors import UnknownNameError
from vtprune.eval import BUNDLED_TASKS
from vtprune.tiny import exercises, sprites, vocabulary
from vtprune.tiny.exercises import KINDS, NEW_WORDS, TASKS, Exercise, exercise, exercise_questions
from vtprune.tiny.exercises.base import LOOKS, Box, Thing
from vtprune.tiny.exercises.lettering import lettering

SPLITS = ("train", "dev", "test")
WRITTEN = vocabulary.COLORS[: vocabulary.ASKED_COLORS]
IDS = {**vocabulary.WORD_IDS, **{word: 1000 + place for place, word in enumerate(NEW_WORDS)}}
COUNT = 40


def _nearest_color(pixels: np.ndarray) -> str:
    """The colour that may be asked about nearest to the mean of [N, 3] pixels."""
    return min(WRITTEN, key=lambda name: float(np.abs(pixels.mean(0) - vocabulary.PALETTE[name]).sum()))


def _cut(frame: np.ndarray, box: Box) -> np.ndarray:
    return frame[box.top : box.top + box.height, box.left : box.left + box.width].astype(float)


def _likeness(region: np.ndarray, mask: np.ndarray) -> float:
    """How much of a region's variance is explained by ink here and ground there."""
    inside = region[mask > 0.9]
    outside = region[mask < 0.1]
    within = ((inside - inside.mean(0)) ** 2).sum() + ((outside - outside.mean(0)) ** 2).sum()
    return 1 - within / ((region - region.mean((0, 1))) ** 2).sum()


def _shape_and_color(frame: np.ndarray, thing: Thing) -> tuple[str, str]:
    """What a careful eye sees in the box of a thing."""
    region, size = _cut(frame, thing.box), thing.box.height
    masks = [
        (shape, sprites.shape_mask(shape, size, variant))
        for shape in vocabulary.SHAPES
        for variant in range(sprites.variants(shape))
    ]
    # a circle has no ground but in its corners; all masks do
    shape, mask = max(masks, key=lambda entry: _likeness(region, entry[1]))
    return shape, _nearest_color(region[mask > 0.99])


def _words(item: Exercise) -> dict[str, str]:
    """Written word -> ink, from the pixels in the boxes."""
    found = {}
    for thing in item.things:
        region = _cut(item.frames[0], thing.box)
        fitting = [word for word in WRITTEN if lettering(word).shape == region.shape[:2]]
        text = max(fitting, key=lambda word: _likeness(region, lettering(word)))
        found[text] = _nearest_color(region[lettering(text) > 0])
    return found


def _gaps(item: Exercise) -> dict[str, str]:
    """Ink -> side on which the ring is open: where its band looks least like the rest of it."""
    found = {}
    for thing in item.things:
        region, middle, band = _cut(item.frames[0], thing.box), thing.box.height // 2, 2
        sides = {"top": (band, middle), "bottom": (-1 - band, middle), "left": (middle, band)}
        sides["right"] = (middle, -1 - band)
        colors = {name: region[place] for name, place in sides.items()}
        typical = np.median(list(colors.values()), 0)
        open_at = max(colors, key=lambda name: float(np.abs(colors[name] - typical).sum()))
        found[_nearest_color(np.stack([value for name, value in colors.items() if name != open_at]))] = open_at
    return found


def _answer_pair(question: str, shown: list[list[tuple[str, str]]]) -> str:
    ordinals = ("first", "second")
    if match := re.fullmatch(r"which image has a (\w+) (\w+)\?", question):
        held = [(match[2], match[1]) in picture for picture in shown]
        return "both" if all(held) else ordinals[held[1]] if any(held) else "neither"
    if match := re.fullmatch(r"which image has more (\w+?)e?s\?", question):
        counts = [sum(shape.rstrip("e") == match[1] for shape, _ in picture) for picture in shown]
        assert counts[0] != counts[1]
        return ordinals[counts[1] > counts[0]]
    match = re.fullmatch(r"what color is the (\w+) in the (\w+) image\?", question)
    assert match is not None, question
    (color,) = (color for shape, color in shown[ordinals.index(match[2])] if shape == match[1])
    return color


def _answer_film(question: str, item: Exercise) -> str:
    places: dict[str, list[tuple[int, Box]]] = {}
    for thing in item.things:
        places.setdefault(_shape_and_color(item.frames[thing.frame], thing)[0], []).append((thing.frame, thing.box))
    if match := re.fullmatch(r"which way does the (\w+) move\?", question):
        (first, start), (last, end) = places[match[1]][0], places[match[1]][-1]
        assert (first, last) == (0, len(item.frames) - 1)
        down, right = end.top - start.top, end.left - start.left
        assert (down == 0) != (right == 0)
        return ("up", "down")[down > 0] if down else ("left", "right")[right > 0]
    match = re.fullmatch(r"which shape (appears|disappears)\?", question)
    assert match is not None, question
    at = 0 if match[1] == "appears" else len(item.frames) - 1
    (shape,) = (name for name, seen in places.items() if at not in [frame for frame, _ in seen])
    return shape


def _derive(task: str, item: Exercise) -> list[str]:
    """The answers to all questions of an exercise, from its pixels and from where things stand."""
    asked = [draft.question.rstrip("?").split() for draft in item.drafts]
    if task == "words":
        inks = _words(item)
        texts = {ink: text for text, ink in inks.items()}
        return [texts[words[3]] if words[-1] == "say" else inks[words[-1]] for words in asked]
    if task == "gaps":
        sides = _gaps(item)
        return [sides[words[-2]] for words in asked]
    if task == "pairs":
        shown = [
            [_shape_and_color(item.frames[frame], thing) for thing in item.things if thing.frame == frame]
            for frame in range(2)
        ]
        return [_answer_pair(draft.question, shown) for draft in item.drafts]
    return [_answer_film(draft.question, item) for draft in item.drafts]


@pytest.mark.parametrize("task", TASKS)
def test_answers_can_be_read_off_the_pixels(task: str) -> None:
    kinds, wrong, total = set(), [], 0
    for index in range(COUNT):
        item = exercise(task, "dev", 3, index)
        assert item.drafts
        for draft, seen in zip(item.drafts, _derive(task, item), strict=True):
            kinds.add(draft.kind)
            total += 1
            if seen != draft.answer:
                wrong.append((index, draft.question, draft.answer, seen))
    assert kinds == set(KINDS[task])
    assert not wrong, f"{len(wrong)} of {total}: {wrong[:5]}"


@pytest.mark.parametrize("task", TASKS)
def test_an_exercise_depends_on_its_number_and_on_nothing_else(task: str) -> None:
    first, again = exercise_questions(task, "test", 3, 5), exercise_questions(task, "test", 2, 5, per_image=2)
    for (frames, asked), (same, fewer) in zip(first[:2], again, strict=True):
        assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in same]
        assert asked[: len(fewer)] == fewer
    drawn = {
        exercise(task, split, seed, index).frames.tobytes() for split in SPLITS for seed in (0, 1) for index in (0, 1)
    }
    assert len(drawn) == 12


def test_tasks_share_no_random_stream(monkeypatch) -> None:
    streams = []

    def spy(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
        streams.append(stream)
        return np.random.default_rng([seed, SPLITS.index(split), index, stream])

    monkeypatch.setattr(exercises, "generator", spy)
    for task in TASKS:
        exercise(task, "dev", 0, 0)
    # 0, 1 and 2 lay out, paint and question scenes
    assert len(set(streams)) == len(TASKS)
    assert not set(streams) & {0, 1, 2}


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_much_likelier_than_its_rivals(task: str) -> None:
    answers: dict[str, Counter[str]] = {}
    for index in range(300):
        for draft in exercise(task, "dev", 1, index).drafts:
            answers.setdefault(draft.kind, Counter())[draft.answer] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) / sum(counts.values()) < 1.5 / len(counts), (kind, counts)


@pytest.mark.parametrize("task", TASKS)
def test_every_word_is_known_and_every_read_has_a_thing(task: str) -> None:
    for index in range(COUNT):
        item = exercise(task, "train", 2, index)
        numbers = {thing.number for thing in item.things}
        for draft in item.drafts:
            assert vocabulary.UNK not in vocabulary.encode(f"{draft.question} {draft.answer}", IDS)
            (read,) = draft.reads
            assert read.objects < 1 << (max(numbers) + 1)
            assert read.objects or draft.answer == "neither"
    assert not set(NEW_WORDS) & set(vocabulary.WORDS)
    assert len(set(NEW_WORDS)) == len(NEW_WORDS)


def test_things_lie_inside_and_apart() -> None:
    for task in TASKS:
        for index in range(COUNT):
            item = exercise(task, "train", 4, index)
            height, width = item.frames.shape[1:3]
            for frame in range(len(item.frames)):
                boxes = [thing.box for thing in item.things if thing.frame == frame]
                for place, box in enumerate(boxes):
                    assert min(box.top, box.left, height - box.top - box.height, width - box.left - box.width) >= 0
                    assert not any(box.overlaps(other) for other in boxes[:place])


def test_films_move_a_little_at_a_time_and_label_what_moves() -> None:
    for index in range(COUNT):
        item = exercise("films", "dev", 6, index)
        assert item.is_film
        assert item.frames.shape == (8, 80, 80, 3)
        for number in {thing.number for thing in item.things}:
            mine = [thing for thing in item.things if thing.number == number]
            (label,) = {LOOKS[thing.look] for thing in mine}
            steps = {(b.box.top - a.box.top, b.box.left - a.box.left) for a, b in pairwise(mine)}
            wanted = {"moves up": (-4, 0), "moves down": (4, 0), "moves left": (0, -4), "moves right": (0, 4)}
            assert steps <= {wanted.get(label, (0, 0))}


def test_letters_differ_and_no_letter_is_empty() -> None:
    glyphs = {letter: lettering(letter, 1) for letter in "".join(WRITTEN)}
    assert all(glyph.shape == (7, 5) and glyph.sum() >= 6 for glyph in glyphs.values())
    assert len({glyph.tobytes() for glyph in glyphs.values()}) == len(glyphs)
    assert lettering("red").shape == (14, 34)


def test_the_page_shows_the_figures_that_the_script_draws() -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    script, page = runpy.run_path(str(docs / "task_figures.py")), (docs / "tasks.md").read_text(encoding="utf-8")
    for task in TASKS:
        name = f"task_{task}.png"
        assert f"](assets/{name})" in page
        with Image.open(docs / "assets" / name) as shown:
            drawn = script["draw"](task)
            assert shown.size == drawn.size
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(drawn.convert("RGB")))
    assert all(f"`{task}`" in page for task in BUNDLED_TASKS)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'word'.*Did you mean 'words'"):
        exercise("word", "dev", 0, 0)
    with pytest.raises(ValueError, match=r"train, dev, test, got 'valid'"):
        exercise("words", "valid", 0, 0)
