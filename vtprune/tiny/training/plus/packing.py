"""Batches of exercises: pictures, what each visual token shows, and all questions about them in one row."""

from __future__ import annotations

import numpy as np

from vtprune.tiny.exercises import Exercise, exercise
from vtprune.tiny.exercises.films import FILM_SIZE
from vtprune.tiny.training.packing import Batch, pack, scene_batch
from vtprune.tiny.training.plus.network import WORD_IDS, Film, OnePicture, SeriesGrid, TwoPictures, View
from vtprune.tiny.training.plus.recipe import READ_LAYERS
from vtprune.tiny.training.recipe import TRAINING_WEIGHTS
from vtprune.tiny.training.vlms.qwen2_vl import Qwen2VL

# room for nearly all questions of a row
TEXT_TOKENS = {"words": 104, "gaps": 72, "pairs": 104, "films": 40, "scenes": 104}
VIEWS: dict[str, type[View]] = {
    "words": OnePicture,
    "gaps": OnePicture,
    "pairs": TwoPictures,
    "films": Film,
    "scenes": OnePicture,
}
# a token belongs to a thing that covers a ninth of it
_COVERED = 1 / 9


def exercise_batch(task: str, split: str, seed: int, first: int, size: int) -> Batch:
    """Exercises `first` .. `first + size - 1`.

    The labels [B, 5, V] of a batch are: look, picture or moment (-1: a word), 0, number of the thing (-1: none), does a
    reader need this token.
    """
    grid, rows = VIEWS[task].grid, [exercise(task, split, seed, index) for index in range(first, first + size)]
    packed = [
        pack(row, item.drafts, TEXT_TOKENS[task], grid.after, WORD_IDS, READ_LAYERS) for row, item in enumerate(rows)
    ]
    text = np.stack([entry[0] for entry in packed])
    targets, reads = ([line for entry in packed for line in entry[part]] for part in (1, 2))
    return Batch(
        np.stack([item.frames for item in rows]),
        np.stack([token_labels(grid, item) for item in rows]),
        np.zeros((size, 0), np.float32),
        text[:, 0],
        text[:, 1],
        text[:, 2],
        np.array(targets, np.int64).reshape(-1, 5),
        np.array(reads, np.int64).reshape(-1, 5),
        np.zeros((0, 5), np.int64),
        [entry[4] for entry in packed],
    )


def token_labels(grid: SeriesGrid, item: Exercise) -> np.ndarray:
    """[5, V] labels of one exercise; see `exercise_batch`."""
    side, size = grid.side, item.frames.shape[1]
    # pictures are enlarged to the grid's size
    scale = grid.pixels / size if size != FILM_SIZE else 1.0
    labels = np.zeros((5, grid.tokens), np.int64)
    labels[1], labels[3] = -1, -1
    cells = grid.visual.reshape(grid.frames, side, side)
    labels[1, cells] = np.arange(grid.frames)[:, None, None]
    per_moment = len(item.frames) // grid.frames
    edges = np.arange(side) * grid.cell
    for thing in item.things:
        places = cells[thing.frame // per_moment]
        low = [value * scale for value in (thing.box.top, thing.box.left)]
        extent = [value * scale for value in (thing.box.height, thing.box.width)]
        overlap = [
            np.clip(np.minimum(edges + grid.cell, start + length) - np.maximum(edges, start), 0, None)
            for start, length in zip(low, extent, strict=True)
        ]
        covered = overlap[0][:, None] * overlap[1][None, :] / grid.cell**2
        middle = tuple(int((start + length / 2) / grid.cell) for start, length in zip(low, extent, strict=True))
        mine = places[covered >= _COVERED] if thing.is_long else places[middle][None]
        labels[0, mine], labels[3, mine], labels[4, mine] = thing.look, thing.number, 1
    return labels


def old_batch(split: str, seed: int, first: int, size: int, easy: int) -> Batch:
    """Scenes and easy-VQA pictures, which must not be forgotten."""
    batch = scene_batch(
        Qwen2VL.grid, split, seed, first, size, easy=easy, text_tokens=TEXT_TOKENS["scenes"], weights=TRAINING_WEIGHTS
    )
    return Batch(**{**vars(batch), "images": batch.images[:, None]})
