"""Pictures of what a prefill kept: every part of an image that no surviving token covers is greyed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image

from vtprune.errors import InputError

if TYPE_CHECKING:
    from vtprune.layout import Layout
    from vtprune.report import Report

__all__ = ["Drawing", "draw_kept"]

_GREY, _FADE = 128.0, 0.82


@dataclass(frozen=True)
class Drawing:
    """One grid of tokens, drawn.

    Attributes:
        image: index of the image (or video) in the sample.
        grid: index of the grid in the sample; an image that is cut into crops has several.
        frame: of the video, None in a still image.
        picture: RGB, of the size of the image or frame, greyed where nothing survived.
    """

    image: int
    grid: int
    frame: int | None
    picture: Image


def draw_kept(
    report: Report, images: Sequence[Image | Sequence[Image]], *, sample: int = 0, stage: int = -1
) -> list[Drawing]:
    """Draw the tokens that are left onto the images they came from.

    Args:
        report: of the call, `session.report`.
        images: of this sample in the order of the prompt: an image, or the frames of a video. An image must show what
            the model was shown: where the processor cuts off borders, pass the image cut alike.
        sample: which sample of the batch.
        stage: after which stage of the plan; the last one unless given.

    Returns:
        one drawing a grid. Newline tokens cover no pixels: they are not drawn, nor is a grid of nothing else.

    Raises:
        InputError: if the call held no images, or other images or frames are passed than it had.
    """
    layout = _layout(report, sample)
    wanted = max(layout.images[sample], default=-1) + 1
    if len(images) != wanted:
        raise InputError(f"sample {sample} had {wanted} image(s) and video(s), got {len(images)} to draw on.")
    if report.kept and not -len(report.kept) <= stage < len(report.kept):
        raise InputError(f"stage must be one of the {len(report.kept)} that ran, got {stage}.")
    kept: Any = report.kept[stage].indices[sample].tolist() if report.kept else range(layout.counts[sample])
    alive = np.zeros(layout.counts[sample], bool)
    alive[list(kept)] = True
    first, drawings = 0, []
    for number, (grid, owner) in enumerate(zip(layout.grids[sample], layout.images[sample], strict=True)):
        cells = alive[first : first + grid.tokens].reshape(grid.rows, grid.cols)
        first += grid.tokens
        across = grid.cols - int(grid.newline)
        if across:
            picture = _picture(images[owner], owner, grid.frame)
            drawings.append(Drawing(owner, number, grid.frame, _fade(picture, cells[:, :across])))
    return drawings


def _layout(report: Report, sample: int) -> Layout:
    layout = report.layout
    if layout is None or not any(layout.counts):
        raise InputError("the last call held no images, so there is nothing to draw.")
    if not 0 <= sample < len(layout.counts):
        raise InputError(f"the last call had {len(layout.counts)} sample(s), got sample={sample}.")
    return layout


def _picture(image: Image | Sequence[Image], owner: int, frame: int | None) -> Image:
    """The still image, or the video's frame."""
    if isinstance(image, Sequence):
        if frame is None:
            raise InputError(f"image {owner} is a still image, got a sequence of {len(image)} to draw on.")
        if frame >= len(image):
            raise InputError(f"video {owner} has a token grid at frame {frame}, got only {len(image)} frames.")
        return image[frame]
    if frame is not None:
        raise InputError(f"image {owner} is a video, got a single picture; pass the sequence of its frames.")
    return image


def _fade(image: Image, cells: np.ndarray) -> Image:
    """`image` greyed where `cells` [rows, cols] is False; a pixel belongs to the cell that holds its middle."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    down, across = (
        ((np.arange(size) + 0.5) * count // size).astype(int)
        for size, count in zip(pixels.shape, cells.shape, strict=False)
    )
    mask = cells[np.ix_(down, across)][..., None]
    faded = _FADE * _GREY + (1 - _FADE) * pixels
    return PILImage.fromarray(np.where(mask, pixels, faded).round().astype(np.uint8))
