"""Frames: which tokens of a sample belong to one film, to one frame of it, and to one place in its frames.

A film is a video, or a still image, which is a film of one frame. Axes: B samples, V visual tokens alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtprune.views import TokenView

__all__ = ["FrameMap", "film_numbers", "frame_numbers", "opening_tokens", "ranks_within", "shown_frames"]


@lru_cache(maxsize=256)
def frame_numbers(images: tuple[int, ...], frames: tuple[int | None, ...]) -> tuple[tuple[int, int], ...]:
    """For each grid of a sample the frame it belongs to, counted through the sample, and its number inside that frame.

    Grids of one image that show the same frame are one frame (a CLS token and its patches), and so are the grids of a
    still image (its crops). A grid of a video that shows no frame (the newline at its end) goes with the frame before.

    Args:
        images: of each grid the index of its image or video.
        frames: of each grid the index of its frame, None in a still image.
    """
    numbers: list[tuple[int, int]] = []
    frame, inside = -1, 0
    before: tuple[int, int | None] | None = None
    for image, shown in zip(images, frames, strict=True):
        if before is not None and before[0] == image and shown in (before[1], None):
            inside += 1
        else:
            frame, inside, before = frame + 1, 0, (image, shown)
        numbers.append((frame, inside))
    return tuple(numbers)


def film_numbers(images: Sequence[int], numbers: Sequence[tuple[int, int]]) -> list[int]:
    """For each frame of a sample the image or video that it belongs to; `numbers` are those of `frame_numbers`."""
    return list({frame: image for image, (frame, _) in zip(images, numbers, strict=True)}.values())


@lru_cache(maxsize=256)
def opening_tokens(images: tuple[int, ...], frames: tuple[int | None, ...], sides: tuple[tuple[int, int], ...]) -> int:
    """Tokens of a sample that lie where no earlier frame of their film has one: still images, and first frames.

    Args:
        images, frames: as for `frame_numbers`.
        sides: (rows, cols) of each grid.
    """
    shapes: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for image, (_, inside), side in zip(images, frame_numbers(images, frames), sides, strict=True):
        shapes.setdefault((image, inside), set()).add(side)
    # frames of different sizes share their upper left corner
    return sum(
        max(cols for rows, cols in each if rows > row) for each in shapes.values() for row in range(max(each)[0])
    )


@dataclass(frozen=True)
class FrameMap:
    """Where the tokens of a view lie in time.

    Attributes:
        film: [B, V] index of the token's image or video in the sample.
        frame: [B, V] its frame, counted through the sample.
        place: [B, V] its place in the frame, the same number at the same place of every frame.
        films: for each sample and frame the film.
        places: a number above every place.
    """

    film: Tensor
    frame: Tensor
    place: Tensor
    films: tuple[tuple[int, ...], ...]
    places: int

    @classmethod
    def of(cls, view: TokenView) -> FrameMap:
        """Read it off a view; 0 at padding."""
        numbers = [
            frame_numbers(images, frames) for images, frames in zip(view.images, shown_frames(view), strict=True)
        ]
        films = tuple(tuple(film_numbers(*each)) for each in zip(view.images, numbers, strict=True))
        width = max((len(grids) for grids in view.grids), default=0)
        if not width:
            zero = torch.zeros_like(view.grid)
            return cls(zero, zero, zero, films, 1)
        rest = [[(0, 0, 0)] * (width - len(grids)) for grids in view.grids]
        rows = [
            [(image, *number) for image, number in zip(*each, strict=True)] + padding
            for each, padding in zip(zip(view.images, numbers, strict=True), rest, strict=True)
        ]
        table = torch.tensor(rows, device=view.grid.device)
        film, frame, inside = (table[..., axis].gather(1, view.grid).masked_fill(~view.valid, 0) for axis in range(3))
        down, across = (max(side[axis] for grids in view.grids for side in grids) for axis in (0, 1))
        place = ((inside * down + view.row) * across + view.col).masked_fill(~view.valid, 0)
        deepest = max(inside for row in numbers for _, inside in row)
        return cls(film, frame, place, films, (deepest + 1) * down * across)

    @property
    def width(self) -> int:
        """Frames of the sample that has most, at least 1; a film has no higher number than a frame."""
        return max(1, *(len(films) for films in self.films), *(max(films, default=0) + 1 for films in self.films))

    def before(self, valid: Tensor) -> Tensor:
        """[B, V] for each token the index on the V axis of the one at its place in the nearest earlier frame.

        A frame whose token at that place has left is passed over. A token without a forerunner gets its own index, and
        so does padding.
        """
        key = (self.film * self.places + self.place) * self.width + self.frame
        key = key.masked_fill(~valid, torch.iinfo(key.dtype).max)
        order = key.argsort(dim=1, stable=True)
        spot = key.gather(1, order) // self.width
        same = (spot[:, 1:] == spot[:, :-1]) & valid.gather(1, order)[:, 1:]
        later = order[:, 1:]
        own = torch.arange(key.shape[1], device=key.device).expand_as(key)
        return own.scatter(1, later, order[:, :-1].where(same, later))


def shown_frames(view: TokenView) -> tuple[tuple[int | None, ...], ...]:
    """Frame of each grid of each sample; a view that knows none holds still images."""
    return view.frames or tuple((None,) * len(grids) for grids in view.grids)


def ranks_within(scores: Tensor, part: Tensor, parts: int, valid: Tensor) -> Tensor:
    """[B, V] how many tokens of its own part come before each token: 0 for the best, ties to the earlier.

    Args:
        scores: [B, V], higher is better; NaN counts as lowest. Compared in fp32.
        part: [B, V] number of its part, below `parts`.
        parts: how many there are.
        valid: [B, V]; ranks of padding mean nothing.
    """
    ranked = scores.float().nan_to_num(nan=float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)
    mine = part.masked_fill(~valid, parts).gather(1, order)
    order = order.gather(1, mine.argsort(dim=1, stable=True))
    sizes = part.new_zeros(part.shape[0], parts + 1).scatter_add_(
        1, part.masked_fill(~valid, parts), torch.ones_like(part)
    )
    first = (sizes.cumsum(1) - sizes).gather(1, part.masked_fill(~valid, parts))
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return place - first
