"""Batches: pictures with token labels, and many questions about one picture packed into one row.

A packed row is `<bos> user : <image>*V`, then for every question `question assistant : answer`. A question sees
the prefix and itself only, and its positions start right behind the picture, as if it stood there alone. What stands
between picture and question is repeated before every question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune.tiny import sprites
from vtprune.tiny.questions import FIRST_ANSWER_TOKEN, LAST_PROMPT_TOKEN, WEIGHTS, Draft, ask
from vtprune.tiny.scenes import SceneObject, paint, question_generator, scene_objects
from vtprune.tiny.training.easy import EasyPicture, easy_pictures
from vtprune.tiny.training.recipe import READ_LAYER
from vtprune.tiny.training.vlms import TokenGrid
from vtprune.tiny.vocabulary import (
    ASKED_COLORS,
    ASKED_KINDS,
    COLORS,
    EOS,
    IMAGE_SIZE,
    KINDS,
    SUFFIX,
    WORD_IDS,
    encode,
)

NAMES = ASKED_KINDS + ASKED_COLORS + ASKED_KINDS * ASKED_COLORS
NO_REGION = 9
IGNORE = -100
# 9 of the 64 px of a patch
_COVERED = 9 / 64
QUESTIONS_PER_ROW, TEXT_TOKENS = 14, 152


@dataclass(frozen=True)
class Batch:
    """B pictures with labels and packed questions; V visual tokens, T text tokens.

    images: [B, 128, 128, 3] uint8, empty when only labels were wanted.
    labels: [B, 5, V] int64 by token: kind + 1 and colour + 1 (0 ground), region of the object's centre (0..8, 9 none),
        object number (-1 none), in which of its patches the object's centre lies (from 1; 0: not here); kind or colour
        is IGNORE where an easy-VQA picture does not tell it.
    names: [B, NAMES] float32, which askable kinds, colours and pairs are in the picture; -1 when unknown.
    ids, segments, positions: [B, T] int64; segment 0 is padding.
    targets: [R, 5] int64: picture, text position that predicts, word, question, is the word <eos>.
    reads: [U, 5] int64: picture, text position, object bits, mode, decoder layer.
    compares: [C, 5] int64: picture, text position, second minus first object in px (down, right), is it "yes".
    drafts: questions by picture, in the order `targets` counts them.
    """

    images: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    reads: np.ndarray
    compares: np.ndarray
    drafts: list[list[Draft]]


def token_labels(grid: TokenGrid, objects: list[SceneObject]) -> np.ndarray:
    """[5, V] labels of one scene; a token belongs to the object that covers most of it, from a seventh of it on."""
    cover = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int64)
    for number, item in enumerate(objects):
        box = cover[item.top : item.top + item.size, item.left : item.left + item.size]
        if item.is_digit:
            box[:] = number + 1
        else:
            box[sprites.shape_mask(KINDS[item.kind], item.size, item.variant) > 0.5] = number + 1
    centers = [item.center for item in objects]
    table = [(item.kind + 1, item.color + 1, item.row * 3 + item.column) for item in objects]
    return _label_tokens(grid, cover, centers, table)


def _label_tokens(
    grid: TokenGrid, cover: np.ndarray, centers: list[tuple[float, float]], table: list[tuple[int, int, int]]
) -> np.ndarray:
    """[5, V] labels from a map of object numbers + 1, and each object's centre and (kind + 1, colour + 1, region).

    Where several objects have their centre in one token, it belongs to the first: those that are asked about come
    before clutter, and no two of them are that close.
    """
    side, cell, tokens = grid.side, grid.cell, grid.tokens
    if grid.pixels != IMAGE_SIZE:
        nearest = (np.arange(grid.pixels) + 0.5) * IMAGE_SIZE // grid.pixels
        cover = cover[np.ix_(nearest.astype(int), nearest.astype(int))]
    blocks = cover.reshape(side, cell, side, cell).transpose(0, 2, 1, 3).reshape(tokens, -1)
    width = len(centers) + 1
    flat = blocks + np.arange(tokens)[:, None] * width
    area = np.bincount(flat.ravel(), minlength=tokens * width).reshape(tokens, width)[:, 1:]
    owner = np.where(area.max(1) >= _COVERED * cell**2, area.argmax(1), -1)
    place = np.zeros((1, tokens), np.int64)
    # the first object is written last
    for number, center in reversed(list(enumerate(centers))):
        down, across = (int(axis * side * grid.merge // IMAGE_SIZE) for axis in center)
        token = down // grid.merge * side + across // grid.merge
        owner[token] = number
        place[0, token] = 1 + down % grid.merge * grid.merge + across % grid.merge
    labels = np.where(owner[None] >= 0, np.array(table)[owner].T, np.array([[0], [0], [NO_REGION]]))
    return np.concatenate([labels, owner[None], place])


def easy_labels(grid: TokenGrid, picture: EasyPicture) -> tuple[np.ndarray, np.ndarray]:
    """([5, V] token labels, [NAMES] names) of an easy-VQA picture, as of a scene with one object."""
    down, across = ((float(axis.min()) + float(axis.max())) / 2 for axis in np.nonzero(picture.cover))
    row, column = (int(axis * 3 // IMAGE_SIZE) for axis in (down, across))
    kind, color = picture.kind, picture.color
    told_kind, told_color = (IGNORE if value is None else value + 1 for value in (kind, color))
    table = [(told_kind, told_color, row * 3 + column)]
    labels = _label_tokens(grid, picture.cover.astype(np.int64), [(down, across)], table)
    if kind is None or color is None:
        return labels, np.full(NAMES, -1, np.float32)
    names = np.zeros(NAMES, np.float32)
    names[[kind, ASKED_KINDS + color, ASKED_KINDS + ASKED_COLORS + kind * ASKED_COLORS + color]] = 1
    return labels, names


def _names(objects: list[SceneObject]) -> np.ndarray:
    names = np.zeros(NAMES, np.float32)
    for item in objects:
        if item.askable:
            pair = ASKED_KINDS + ASKED_COLORS + item.kind * ASKED_COLORS + item.color
            names[[item.kind, ASKED_KINDS + item.color, pair]] = 1
    return names


def pack(
    row: int,
    drafts: Sequence[Draft],
    length: int,
    after: tuple[int, ...] = (),
    words: Mapping[str, int] = WORD_IDS,
    layers: Mapping[str, int] = READ_LAYER,
) -> tuple[np.ndarray, list[tuple], list[tuple], list[tuple], list[Draft]]:
    """One row: (ids, segments, positions) [3, length], targets, reads, compares, and the questions that fitted.

    `words` are the ids of a larger vocabulary, `layers` the taught layer by kind of question.
    """
    text = np.zeros((3, length), np.int64)
    targets: list[tuple] = []
    reads: list[tuple] = []
    compares: list[tuple] = []
    fitted: list[Draft] = []
    start = 0
    for draft in drafts:
        prompt, answer = (*after, *encode(draft.question, words), *SUFFIX), encode(draft.answer, words)
        end = start + len(prompt) + len(answer)
        if end > length:
            continue
        text[0, start:end] = (*prompt, *answer)
        text[1, start:end] = len(fitted) + 1
        text[2, start:end] = np.arange(end - start)
        last = start + len(prompt) - 1
        places = {LAST_PROMPT_TOKEN: last, FIRST_ANSWER_TOKEN: last + 1}
        for offset, word in enumerate((*answer, EOS)):
            targets.append((row, last + offset, word, len(fitted), int(word == EOS)))
        for read in draft.reads:
            position = places.get(read.position, start + len(after) + read.position)
            reads.append((row, position, read.objects, read.mode, layers[draft.kind]))
        if draft.compare is not None:
            place, down, right, says_yes = draft.compare
            compares.append((row, start + len(after) + place, round(down), round(right), int(says_yes)))
        fitted.append(draft)
        start = end
    return text, targets, reads, compares, fitted


def collate(
    grid: TokenGrid,
    images: list[np.ndarray],
    labels: list[np.ndarray],
    names: list[np.ndarray],
    drafts: list[list[Draft]],
    text_tokens: int = TEXT_TOKENS,
) -> Batch:
    """Packs the questions of each picture and stacks everything."""
    packed = [pack(row, asked, text_tokens, grid.after) for row, asked in enumerate(drafts)]
    text = np.stack([entry[0] for entry in packed])
    targets = [target for entry in packed for target in entry[1]]
    reads = [read for entry in packed for read in entry[2]]
    compares = [compare for entry in packed for compare in entry[3]]
    return Batch(
        np.stack(images) if images else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        np.stack(labels),
        np.stack(names),
        text[:, 0],
        text[:, 1],
        text[:, 2],
        np.array(targets, np.int64).reshape(-1, 5),
        np.array(reads, np.int64).reshape(-1, 5),
        np.array(compares, np.int64).reshape(-1, 5),
        [entry[4] for entry in packed],
    )


def scene_batch(
    grid: TokenGrid,
    split: str,
    seed: int,
    first: int,
    size: int,
    *,
    easy: int = 0,
    dense: bool = False,
    painted: bool = True,
    questions: int = QUESTIONS_PER_ROW,
    text_tokens: int = TEXT_TOKENS,
    weights: Mapping[str, float] = WEIGHTS,
) -> Batch:
    """Scenes `first` .. `first + size - 1` of a split; the first `easy` of them replaced by easy-VQA pictures."""
    images, labels, names, drafts = [], [], [], []
    for index in range(first, first + size):
        rng = question_generator(split, seed, index)
        if index < first + easy:
            pictures = easy_pictures(split)
            picture = pictures[int(rng.integers(len(pictures)))]
            if painted:
                images.append(picture.pixels)
            patches, named = easy_labels(grid, picture)
            labels.append(patches)
            names.append(named)
            drafts.append(
                [picture.drafts[place] for place in rng.permutation(len(picture.drafts))] if questions else []
            )
            continue
        objects = scene_objects(split, seed, index, dense=dense)
        if painted:
            images.append(paint(objects, split, seed, index))
        labels.append(token_labels(grid, objects))
        names.append(_names(objects))
        drafts.append(ask(objects, rng, questions, weights) if questions else [])
    return collate(grid, images, labels, names, drafts, text_tokens if questions else 8)


COLOR_CLASSES, KIND_CLASSES = len(COLORS) + 1, len(KINDS) + 1
