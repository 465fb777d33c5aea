"""Pictures of what each method keeps: the image as the model sees it, dropped tokens greyed out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vtprune.eval.harness import Harness, Sample
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.eval.runner import SweepResult

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat

__all__ = ["Example", "Tile", "draw_kept", "make_examples"]

_SIDE = 192
_GREY = np.array([128.0, 128.0, 128.0])
_FADE = 0.82


@dataclass(frozen=True)
class Tile:
    """One method on one image."""

    caption: str
    prediction: str
    right: bool
    image: Image.Image


@dataclass(frozen=True)
class Example:
    """One question with the right answer, and what every method saw of the image."""

    question: str
    answer: str
    tiles: tuple[Tile, ...]


def draw_kept(image: Image.Image, kept: Sequence[int], rows: int, cols: int) -> Image.Image:
    """`image` with every cell of the rows x cols token grid faded to grey that is not in `kept`.

    Args:
        image: RGB.
        kept: raster indices of the surviving tokens.
        rows, cols: of the token grid.
    """
    side = (cols * max(1, _SIDE // cols), rows * max(1, _SIDE // rows))
    pixels = np.asarray(image.resize(side, Image.Resampling.BICUBIC), np.float64)
    alive = np.zeros(rows * cols, bool)
    alive[list(kept)] = True
    mask = np.kron(alive.reshape(rows, cols), np.ones((side[1] // rows, side[0] // cols)))[..., None]
    faded = _FADE * _GREY + (1 - _FADE) * pixels
    return Image.fromarray(np.where(mask > 0, pixels, faded).round().astype(np.uint8))


def make_examples(result: SweepResult, harness: Harness, lm: VtpruneChat, per_task: int = 2) -> list[Example]:
    """The first images of each task under one budget, every method side by side.

    The budget is the one in the middle of the sweep. Images that are cut into crops, or whose tokens do not
    form one square grid, are left out.
    """
    rows = _one_budget(result.rows)
    examples = []
    for task in result.rows[0].tasks:
        for place, prompt in enumerate(harness.prompts(lm, task, per_task)):
            asked = _sample(result, UNPRUNED_ROW, task, place)
            side = math.isqrt(asked.counts["visual_tokens"])
            if len(prompt[1]) != 1 or side * side != asked.counts["visual_tokens"]:
                continue
            inputs = lm.encode([prompt])
            if inputs["pixel_values"].shape[:2] != (1, 3):
                continue
            picture = _as_seen(inputs["pixel_values"][0], lm.processor.image_processor)
            tiles = [_tile("unpruned", asked, draw_kept(picture, range(side * side), side, side))]
            for row in rows:
                kept = _survivors(lm, row, inputs)
                sample = _sample(result, row.name, task, place)
                tiles.append(_tile(f"{row.name} ({len(kept)})", sample, draw_kept(picture, kept, side, side)))
            examples.append(Example(asked.question, asked.answer, tuple(tiles)))
    lm.detach()
    return examples


def _one_budget(rows: Sequence[Row]) -> list[Row]:
    """Of each method the cell that ran at the budget in the middle of the sweep (or its nearest larger one)."""
    keeps = list(dict.fromkeys(row.keep for row in rows if row.method != UNPRUNED_ROW))
    chosen: dict[str, Row] = {}
    for keep in keeps[: len(keeps) // 2 + 1]:
        chosen |= {row.method: row for row in rows if row.keep == keep and row.status == "ok"}
    return list(chosen.values())


def _survivors(lm: VtpruneChat, row: Row, inputs: Mapping[str, Any]) -> list[int]:
    """Tokens that outlive every stage."""
    session = lm.attach(row.method, row.keep_value, basis=row.basis)
    with torch.inference_mode():
        lm.model(**inputs, logits_to_keep=1)
    return session.report.kept[-1].indices[0].tolist()


def _as_seen(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
    """Undo the normalisation of [3, height, width]: resized and cropped as the tower gets it."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(image_processor.image_std)[:, None, None]
    pixels = (pixel_values.float().cpu() * deviation + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def _sample(result: SweepResult, name: str, task: str, place: int) -> Sample:
    return next(sample for sample in result.samples[name][task] if sample.doc_id == place)


def _tile(caption: str, sample: Sample, image: Image.Image) -> Tile:
    return Tile(caption, sample.prediction, sample.score == 1.0, image)
