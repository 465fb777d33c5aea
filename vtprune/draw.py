"""Pictures of what a prefill kept: what no surviving token covers is greyed, and tinted if one stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage
from PIL.Image import Image

from vtprune.errors import InputError

if TYPE_CHECKING:
    from vtprune.layout import Layout
    from vtprune.report import Report

__all__ = ["Drawing", "draw_kept"]

_GREY, _FADE = 128.0, 0.82
# of cells that were merged into another one: half faded, with some blue
_TINT, _MERGED = np.array([70.0, 110.0, 200.0]), 0.55
_DROPPED, _INTO, _KEPT = 0, 1, 2


@dataclass(frozen=True)
class Drawing:
    """One grid of tokens, drawn.

    Attributes:
        image: index of the image (or video) in the sample.
        grid: index of the grid in the sample; an image that is cut into crops has several.
        frame: of the video, None in a still image.
        picture: RGB, of the size of the image or frame, greyed where nothing survived, and bluish where a token was
            merged into another one.
        assumed: nobody knows which pixels a token covers; rows and columns were guessed from their number.
    """

    image: int
    grid: int
    frame: int | None
    picture: Image
    assumed: bool


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
    owners = report.owners(sample, stage).numpy()
    state = np.where(owners < 0, _DROPPED, _INTO)
    state[owners == np.arange(len(owners))] = _KEPT
    first, drawings = 0, []
    for number, (grid, owner) in enumerate(zip(layout.grids[sample], layout.images[sample], strict=True)):
        cells = state[first : first + grid.tokens].reshape(grid.rows, grid.cols)
        first += grid.tokens
        across = grid.cols - int(grid.newline)
        if across:
            picture = _picture(images[owner], owner, grid.frame)
            drawings.append(Drawing(owner, number, grid.frame, _fade(picture, cells[:, :across]), grid.assumed))
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
    """`image` by the states of `cells` [rows, cols]; a pixel belongs to the cell that holds its middle."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    down, across = (
        ((np.arange(size) + 0.5) * count // size).astype(int)
        for size, count in zip(pixels.shape, cells.shape, strict=False)
    )
    state = cells[np.ix_(down, across)][..., None]
    faded = _FADE * _GREY + (1 - _FADE) * pixels
    tinted = _MERGED * _TINT + (1 - _MERGED) * pixels
    shown = np.where(state == _KEPT, pixels, np.where(state == _INTO, tinted, faded))
    return PILImage.fromarray(shown.round().astype(np.uint8))
