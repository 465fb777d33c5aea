"""Questions about a scene, their answers, and where a reader must look to answer them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vtprune.tiny.scenes import THIRD, SceneObject
from vtprune.tiny.vocabulary import ASKED_COLORS, COLORS, COLUMNS, KINDS, PLURALS, ROWS, SHAPES

# kind of question -> how often it is drawn; count and relation learn slowest and get more
WEIGHTS = {
    "color": 1.0,
    "shape_color": 1.0,
    "digit_frame": 1.0,
    "obj_loc": 1.4,
    "where": 1.4,
    "exist": 1.0,
    "count": 1.6,
    "relation": 1.7,
}
KINDS_OF_QUESTION = tuple(WEIGHTS)
# an answer about a place is only asked when the centre is clear of the border between thirds
_CLEAR_PX = 3
_APART_PX = 20
_LARGEST_COUNT = 5

LAST_PROMPT_TOKEN, FIRST_ANSWER_TOKEN = -1, -2
LOOK_AT, COUNT_OVER, LOOK_AT_NOTHING = range(3)


class Read(NamedTuple):
    """One look at the image: from which token (>= 0: word of the question), at which objects, in which mode."""

    position: int
    objects: int
    mode: int


class Compare(NamedTuple):
    """A comparison of places: at which word of the question it can be made, (second - first) in pixels, verdict."""

    position: int
    down: float
    right: float
    says_yes: bool


class Draft(NamedTuple):
    """A question with its answer, kind and the reads that answer it; `objects` masks are bits over the scene."""

    question: str
    answer: str
    kind: str
    reads: tuple[Read, ...]
    compare: Compare | None = None


def _bits(indices: Sequence[int]) -> int:
    return sum(1 << index for index in indices)


def _pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _name(item: SceneObject) -> str:
    return f"digit {KINDS[item.kind]}" if item.is_digit else f"{COLORS[item.color]} {KINDS[item.kind]}"


def _asked(objects: Sequence[SceneObject]) -> list[int]:
    return [index for index, item in enumerate(objects) if item.askable]


def _uniquely_named(objects: Sequence[SceneObject]) -> list[int]:
    names = [_name(item) if item.askable else "" for item in objects]
    return [index for index in _asked(objects) if names.count(names[index]) == 1]


def _color(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    kinds = [item.kind for item in objects]
    single = [index for index in _asked(objects) if kinds.count(kinds[index]) == 1]
    if not single:
        return None
    index = _pick(rng, single)
    item = objects[index]
    subject = f"frame of the digit {KINDS[item.kind]}" if item.is_digit else KINDS[item.kind]
    reads = (Read(LAST_PROMPT_TOKEN, 1 << index, LOOK_AT),)
    return Draft(f"what color is the {subject}?", COLORS[item.color], "color", reads)


def _by_color(objects: Sequence[SceneObject], rng: np.random.Generator, digits: bool) -> Draft | None:
    group = [index for index in _asked(objects) if objects[index].is_digit == digits]
    colors = [objects[index].color for index in group]
    single = [index for index in group if colors.count(objects[index].color) == 1]
    if not single:
        return None
    index = _pick(rng, single)
    item = objects[index]
    color = COLORS[item.color]
    question = f"which digit is in the {color} frame?" if digits else f"which shape is {color}?"
    kind = "digit_frame" if digits else "shape_color"
    return Draft(question, KINDS[item.kind], kind, (Read(LAST_PROMPT_TOKEN, 1 << index, LOOK_AT),))


def _shape_color(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    return _by_color(objects, rng, digits=False)


def _digit_frame(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    return _by_color(objects, rng, digits=True)


def _alone_in_cell(objects: Sequence[SceneObject], index: int) -> bool:
    item = objects[index]
    low = [third * THIRD - _CLEAR_PX for third in (item.row, item.column)]
    high = [edge + THIRD + 2 * _CLEAR_PX for edge in low]
    others = (objects[other].center for other in _asked(objects) if other != index)
    return item.margin >= _CLEAR_PX and not any(
        all(low[axis] < center[axis] < high[axis] for axis in range(2)) for center in others
    )


def _two_reads(index: int) -> tuple[Read, ...]:
    """Both tokens of a two-word answer are read from the same object."""
    return tuple(Read(position, 1 << index, LOOK_AT) for position in (LAST_PROMPT_TOKEN, FIRST_ANSWER_TOKEN))


def _obj_loc(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    alone = [index for index in _asked(objects) if _alone_in_cell(objects, index)]
    if not alone:
        return None
    index = _pick(rng, alone)
    item = objects[index]
    question = f"which object is at the {ROWS[item.row]} {COLUMNS[item.column]}?"
    return Draft(question, f"{COLORS[item.color]} {KINDS[item.kind]}", "obj_loc", _two_reads(index))


def _where(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    clear = [index for index in _uniquely_named(objects) if objects[index].margin >= _CLEAR_PX]
    if not clear:
        return None
    index = _pick(rng, clear)
    item = objects[index]
    answer = f"{ROWS[item.row]} {COLUMNS[item.column]}"
    return Draft(f"where is the {_name(item)}?", answer, "where", _two_reads(index))


def _relation(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    unique = _uniquely_named(objects)
    if len(unique) < 2:
        return None
    first, second = (unique[place] for place in rng.permutation(len(unique))[:2])
    one, two = objects[first], objects[second]
    axis = int(rng.integers(2))
    if abs(one.center[axis] - two.center[axis]) < _APART_PX:
        axis = 1 - axis
    if abs(one.center[axis] - two.center[axis]) < _APART_PX:
        return None
    says_yes = bool(rng.random() < 0.5)
    before = one.center[axis] < two.center[axis]
    relation = (("above", "below"), ("left of", "right of"))[axis][0 if before == says_yes else 1]
    # word of the question that ends each of the two names: "is the <one> <relation> the <two>"
    one_end = 1 + len(_name(one).split())
    two_end = one_end + len(relation.split()) + 1 + len(_name(two).split())
    reads = (Read(one_end, 1 << first, LOOK_AT), Read(two_end, 1 << second, LOOK_AT))
    question = f"is the {_name(one)} {relation} the {_name(two)}?"
    compare = Compare(two_end, two.center[0] - one.center[0], two.center[1] - one.center[1], says_yes)
    return Draft(question, "yes" if says_yes else "no", "relation", reads, compare)


def _exist(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    shapes = [index for index in _asked(objects) if not objects[index].is_digit]
    if not shapes:
        return None
    if rng.random() < 0.5:
        item = objects[_pick(rng, shapes)]
        same = _bits([index for index in shapes if _name(objects[index]) == _name(item)])
        reads = (Read(LAST_PROMPT_TOKEN, same, LOOK_AT),)
        return Draft(f"is there a {_name(item)} in the image?", "yes", "exist", reads)
    present = {(item.kind, item.color) for item in objects}
    for _ in range(8):
        # mostly a shape and a colour that are both in the scene, but not together
        kind = objects[_pick(rng, shapes)].kind if rng.random() < 0.8 else int(rng.integers(len(SHAPES)))
        seen = objects[_pick(rng, _asked(objects))].color
        color = seen if rng.random() < 0.8 else int(rng.integers(ASKED_COLORS))
        if (kind, color) not in present:
            reads = (Read(LAST_PROMPT_TOKEN, 0, LOOK_AT_NOTHING),)
            return Draft(f"is there a {COLORS[color]} {SHAPES[kind]} in the image?", "no", "exist", reads)
    return None


def _count(objects: Sequence[SceneObject], rng: np.random.Generator) -> Draft | None:
    """The asked number is drawn evenly among those the scene offers, then a question with that answer."""
    asked = _asked(objects)
    by_number: dict[int, list[tuple[str, int]]] = {}
    for kind, plural in enumerate(PLURALS):
        same = [index for index in asked if objects[index].kind == kind]
        by_number.setdefault(len(same), []).append((f"how many {plural} are there?", _bits(same)))
    for color in range(ASKED_COLORS):
        same = [index for index in asked if objects[index].color == color]
        by_number.setdefault(len(same), []).append((f"how many {COLORS[color]} objects are there?", _bits(same)))
    number = _pick(rng, [value for value in sorted(by_number) if value <= _LARGEST_COUNT])
    question, same_bits = _pick(rng, by_number[number])
    return Draft(question, str(number), "count", (Read(LAST_PROMPT_TOKEN, same_bits, COUNT_OVER),))


_MAKERS: dict[str, Callable[[Sequence[SceneObject], np.random.Generator], Draft | None]] = {
    "color": _color,
    "shape_color": _shape_color,
    "digit_frame": _digit_frame,
    "obj_loc": _obj_loc,
    "where": _where,
    "exist": _exist,
    "count": _count,
    "relation": _relation,
}


def ask(
    objects: Sequence[SceneObject],
    rng: np.random.Generator,
    per_image: int,
    weights: Mapping[str, float] = WEIGHTS,
) -> list[Draft]:
    """Up to `per_image` different questions about a scene; kinds it does not allow are skipped."""
    share = np.array([weights[kind] for kind in KINDS_OF_QUESTION])
    drafts: list[Draft] = []
    seen: set[str] = set()
    for choice in rng.choice(len(KINDS_OF_QUESTION), size=3 * per_image, p=share / share.sum()):
        draft = _MAKERS[KINDS_OF_QUESTION[choice]](objects, rng)
        if draft is None or draft.question in seen:
            continue
        seen.add(draft.question)
        drafts.append(draft)
        if len(drafts) == per_image:
            break
    return drafts
