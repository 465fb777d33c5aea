"""Pictures of what each method keeps: the image as the model sees it, dropped tokens greyed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtprune.draw import Drawing, draw_kept
from vtprune.eval.harness import Harness, Sample
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.eval.sweep import SweepResult
from vtprune.videos import Video

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.report import Report

__all__ = ["Example", "Tile", "make_examples"]

_SIDE = 192


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


def make_examples(result: SweepResult, harness: Harness, lm: VtpruneChat, per_task: int = 2) -> list[Example]:
    """The first images of each task under one budget, every method side by side.

    The budget is the one in the middle of the sweep. Of an image that is cut into crops the finest grid is drawn.
    Prompts with several images or a video are left out.
    """
    rows = _one_budget(result.rows)
    examples = []
    for task in result.rows[0].tasks:
        for place, prompt in enumerate(harness.prompts(lm, task, per_task)):
            asked = _sample(result, UNPRUNED_ROW, task, place)
            if len(prompt[1]) != 1 or isinstance(prompt[1][0], Video):
                continue
            inputs = lm.encode([prompt])
            picture = _as_seen(inputs["pixel_values"], prompt[1][0], lm.processor.image_processor)
            tiles = [_tile("unpruned", asked, picture)]
            for row in rows:
                if task not in row.tasks:
                    continue
                report = _report(lm, row, inputs)
                drawn = max(draw_kept(report, [picture]), key=lambda drawing: _tokens(report, drawing))
                sample = _sample(result, row.name, task, place)
                tiles.append(_tile(f"{row.name} ({len(report.kept[-1].indices[0])})", sample, drawn.picture))
            examples.append(Example(asked.question, asked.answer, tuple(tiles)))
    lm.detach()
    return examples


def _one_budget(rows: Sequence[Row]) -> list[Row]:
    """Of each method the cell that ran at the budget in the middle of the sweep (or its nearest larger one)."""
    keeps = list(dict.fromkeys(row.keep for row in rows if row.method != UNPRUNED_ROW))
    chosen: dict[str, Row] = {}
    for keep in keeps[: len(keeps) // 2 + 1]:
        chosen |= {row.method: row for row in rows if row.keep == keep and row.status == "ok" and not row.replays}
    return list(chosen.values())


def _report(lm: VtpruneChat, row: Row, inputs: Mapping[str, Any]) -> Report:
    """What one prefill under this cell keeps."""
    session = lm.attach(row.method, row.keep_value, basis=row.basis)
    with torch.inference_mode():
        lm.model(**inputs, logits_to_keep=1)
    return session.report


def _tokens(report: Report, drawing: Drawing) -> int:
    return 0 if report.layout is None else report.layout.grids[0][drawing.grid].tokens


def _as_seen(pixel_values: torch.Tensor, image: Image.Image, image_processor: Any) -> Image.Image:
    """The image resized and cropped as the tower gets it, where the pixels tell; enlarged to a size people can see."""
    if pixel_values.ndim == 4 and pixel_values.shape[:2] == (1, 3):
        mean = torch.tensor(image_processor.image_mean)[:, None, None]
        deviation = torch.tensor(image_processor.image_std)[:, None, None]
        pixels = (pixel_values[0].float().cpu() * deviation + mean).clamp(0, 1) * 255
        image = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
    scale = _SIDE / max(image.size)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)


def _sample(result: SweepResult, name: str, task: str, place: int) -> Sample:
    return next(sample for sample in result.answers[name].samples[task] if sample.doc_id == place)


def _tile(caption: str, sample: Sample, image: Image.Image) -> Tile:
    return Tile(caption, sample.prediction, sample.score == 1.0, image)
