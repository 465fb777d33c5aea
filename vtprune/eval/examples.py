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
from vtprune.prompt import pictures_seen
from vtprune.videos import Video

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.report import Report

__all__ = ["Example", "Tile", "make_examples"]

_SIDE = 192


@dataclass(frozen=True)
class Tile:
    """One method on one image.

    Attributes:
        caption: the row, and how many tokens outlive every stage.
        prediction: what it answered.
        right: that got the full score.
        image: with the dropped tokens greyed out.
        lost: the answer scores below the unpruned model's.
    """

    caption: str
    prediction: str
    right: bool
    image: Image.Image
    lost: bool = False


@dataclass(frozen=True)
class Example:
    """One question with the right answer, and what every method saw of the image.

    Attributes:
        question, answer: of the task.
        tiles: the unpruned model, then one a method.
        task: its name.
    """

    question: str
    answer: str
    tiles: tuple[Tile, ...]
    task: str = ""

    @property
    def lost(self) -> int:
        """How many methods scored below the unpruned model."""
        return sum(tile.lost for tile in self.tiles)


def make_examples(result: SweepResult, harness: Harness, lm: VtpruneChat, per_task: int = 3) -> list[Example]:
    """Questions of each task under one budget, every method side by side; what pruning lost comes first.

    The budget is the one in the middle of the sweep. Of an image that is cut into crops the finest grid is drawn.
    Prompts with several images or a video are left out.
    """
    rows = _one_budget(result.rows)
    examples = []
    for task in result.rows[0].tasks:
        ran = [row for row in rows if task in row.tasks]
        # of several seeds the first is the harness's
        said = {name: _first_by_doc(result, name, task) for name in (UNPRUNED_ROW, *(row.name for row in ran))}
        found = 0
        # a task of pairs or films has none to show: looking on would load all of them
        for place in failures_first(said, per_task)[: 4 * per_task]:
            text, media = harness.prompt_at(lm, task, place)
            if found == per_task or len(media) != 1 or isinstance(media[0], Video):
                continue
            found += 1
            inputs = lm.encode([(text, media)])
            picture = _enlarged(pictures_seen(lm.processor, inputs, [media[0]])[0])
            asked = said[UNPRUNED_ROW][place]
            tiles = [_tile("unpruned", asked, picture, asked)]
            for row in ran:
                report = _report(lm, row, inputs)
                drawn = max(draw_kept(report, [picture]), key=lambda drawing: _tokens(report, drawing))
                caption = f"{row.name} ({len(report.kept[-1].indices[0])})"
                tiles.append(_tile(caption, said[row.name][place], drawn.picture, asked))
            examples.append(Example(asked.question, asked.answer, tuple(tiles), task))
    lm.detach()
    return examples


def failures_first(said: Mapping[str, Mapping[int, Sample]], wanted: int) -> list[int]:
    """Doc ids in the order in which to show them.

    First questions that the unpruned model answers right and pruned rows do not, those that most rows lost in front;
    then, from the last of `wanted` places on, questions that all answer right (there is something to see in what was
    kept there as well); then the rest.

    Args:
        said: answers of each row by doc id, the unpruned model's among them.
        wanted: how many will be shown.
    """
    full = said[UNPRUNED_ROW]
    rows = [answers for name, answers in said.items() if name != UNPRUNED_ROW]
    places = [place for place in sorted(full) if all(place in answers for answers in rows)]
    losses = {place: sum(_lost(answers[place], full[place]) for answers in rows) for place in places}
    right = {place for place in places if full[place].score == 1.0}
    lost = sorted((place for place in right if losses[place]), key=lambda place: (-losses[place], place))
    kept = [place for place in places if place in right and all(answers[place].score == 1.0 for answers in rows)]
    split = max(1, wanted - 1) if kept else wanted
    chosen = [*lost[:split], *kept, *lost[split:]]
    return chosen + [place for place in places if place not in {*chosen}]


def _lost(sample: Sample, asked: Sample) -> bool:
    return sample.score < asked.score


def _first_by_doc(result: SweepResult, name: str, task: str) -> dict[int, Sample]:
    """A row's answers by doc id, the first where there are several."""
    found: dict[int, Sample] = {}
    for sample in result.answers[name].samples[task]:
        found.setdefault(sample.doc_id, sample)
    return found


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


def _enlarged(image: Image.Image) -> Image.Image:
    """At a size that people can see."""
    scale = _SIDE / max(image.size)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)


def _tile(caption: str, sample: Sample, image: Image.Image, asked: Sample) -> Tile:
    return Tile(caption, sample.prediction, sample.score == 1.0, image, _lost(sample, asked))
