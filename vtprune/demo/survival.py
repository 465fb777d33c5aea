"""Reports of pruned prefills -> what the page draws: pictures, and for every token when it left and how it scored."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtprune.demo.ask import Answer
    from vtprune.layout import ImageGrid, Layout
    from vtprune.prompt import Question
    from vtprune.report import Kept, Report

__all__ = ["survival", "survival_of"]

# pictures are shown, not processed: a phone's photograph need not travel back whole
_SIDE = 640


def survival(question: Question, seen: Sequence[Image], answers: Sequence[Answer]) -> dict[str, Any]:
    """All that the viewer needs, JSON-ready.

    Args:
        question: that was asked.
        seen: its images as the model was shown them (`vtprune.prompt.pictures_seen`).
        answers: the pruned ones, each with its report.

    Returns:
        views: one a grid of tokens: `title`, `src` (data URL), `wide` and `high` in pixels, `rows` and `cols` of tokens
            that cover pixels, `stride` (tokens a row, newline tokens included), `first` (index of its first token),
            `guess` (nobody knows which pixels a token covers).
        runs: one an answer: see `survival_of`.
    """
    reports = [answer.report for answer in answers if answer.report is not None]
    if not reports or reports[0].layout is None:
        raise InputError("the last question held no pictures, so there is nothing to show.")
    media = [*seen, *(video.frames for video in question.videos)]
    return {
        "views": _views(reports[0].layout, media, len(question.images)),
        "runs": [
            {"title": answer.title, **survival_of(report)} for answer, report in zip(answers, reports, strict=True)
        ],
    }


def survival_of(report: Report) -> dict[str, Any]:
    """When each visual token of the first sample left.

    Returns:
        total: visual tokens.
        steps: places in the order in which tokens meet them, the first one before anything left: `label`, and `left`,
            how many tokens are still there.
        gone: for each token the index of the step at which it is no longer there, or None.
        into: for each token the survivor that it was merged into, or None if it was dropped or stayed.
        scores: one a stage that scored: `label`, `step`, and `values`, one a token or None.
    """
    total, layers = report.visual_tokens[0], report.tokens_per_layer[0]
    before = [kept for kept in report.kept if kept.site.kind in ("vision", "restart")]
    labels = ["the picture", *(_label(kept) for kept in before), *(f"decoder layer {k}" for k in range(len(layers)))]
    gone: list[int | None] = [None] * total
    scores = []
    for kept in report.kept:
        step = 1 + (before.index(kept) if kept in before else len(before) + kept.site.index)
        survivors = set(kept.indices[0].tolist())
        gone = [step if was is None and token not in survivors else was for token, was in enumerate(gone)]
        if kept.scores is not None and kept.alive is not None:
            scores.append({"label": _label(kept), "step": step, "values": _values(kept, total)})
    left = [sum(was is None or was > step for was in gone) for step in range(len(labels))]
    steps = [{"label": label, "left": count} for label, count in zip(labels, left, strict=True)]
    owners = report.owners(0).tolist() if report.kept else list(range(total))
    into = [None if owner in (-1, token) else owner for token, owner in enumerate(owners)]
    return {"total": total, "steps": steps, "gone": gone, "into": into, "scores": scores}


def _label(kept: Kept) -> str:
    site = kept.site
    if site.kind == "vision":
        return f"after tower block {site.index}"
    if site.kind == "restart":
        return f"restart from layer {site.index}"
    return "before the decoder" if site.kind == "input" else f"before decoder layer {site.index}"


def _values(kept: Kept, total: int) -> list[float | None]:
    values: list[float | None] = [None] * total
    if kept.scores is not None and kept.alive is not None:
        for token, score in zip(kept.alive[0].tolist(), kept.scores[0].tolist(), strict=True):
            values[token] = float(f"{score:.5g}") if math.isfinite(score) else None
    return values


def _views(layout: Layout, media: Sequence[Image | Sequence[Image]], images: int) -> list[dict[str, Any]]:
    views, first = [], 0
    owners = layout.images[0]
    for number, (grid, owner) in enumerate(zip(layout.grids[0], owners, strict=True)):
        across = grid.cols - int(grid.newline)
        if across:
            shown = media[owner]
            picture = shown[grid.frame or 0] if isinstance(shown, Sequence) else shown
            # the place of this grid among those of its image
            nth, of = number - owners.index(owner), owners.count(owner)
            title = _title(owner, images, len(media), grid, nth, of)
            views.append(
                {
                    "title": title,
                    "src": _data_url(picture),
                    "wide": picture.width,
                    "high": picture.height,
                    "rows": grid.rows,
                    "cols": across,
                    "stride": grid.cols,
                    "first": first,
                    "guess": grid.assumed,
                }
            )
        first += grid.tokens
    return views


def _title(owner: int, images: int, media: int, grid: ImageGrid, nth: int, of: int) -> str:
    if owner >= images:
        film = "film" if media - images == 1 else f"film {owner - images + 1}"
        return film if grid.frame is None else f"{film}, from frame {grid.frame + 1}"
    image = "picture" if images == 1 else f"picture {owner + 1}"
    return image if of == 1 else f"{image}, part {nth + 1} of {of}"


def _data_url(image: Image) -> str:
    scale = min(1.0, _SIDE / max(image.size))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    buffer = io.BytesIO()
    # a small picture is enlarged by the browser, where artefacts would show
    image.convert("RGB").save(buffer, "PNG" if max(image.size) <= 256 else "JPEG", quality=90)
    kind = "png" if max(image.size) <= 256 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
