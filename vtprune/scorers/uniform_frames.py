"""Uniform frames: whole frames at even distances, the plain baseline for videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.cells import alive_tokens, sample_cells, split_in_proportion
from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.frames import film_numbers, frame_numbers, shown_frames
from vtprune.plan import Site

__all__ = ["UniformFrames"]


@METHODS.register("uniform-frames")
@dataclass(frozen=True)
class UniformFrames(Scorer):
    """Keeps all tokens of evenly spaced frames, before the decoder. Looks at no content at all.

    A video of T frames gives the fewest m frames that hold the budget, frame floor((2 i + 1) T / 2 m) for i < m: the
    middles of m equal stretches. They are taken in order, and the last is thinned to what is left, by the even grid of
    `uniform`; so the count is exact. A budget below one frame is an even grid over the frame in the middle.
    Videos and images of a prompt share the budget in proportion to their tokens (largest remainder). A still image is
    a video of one frame, that is, what `uniform` makes of it. If an earlier method has taken tokens of a frame, it is
    as large as what is left of it; a frame that is gone is not counted.
    Positions: survivors keep theirs.
    Cost: integer arithmetic, cached.
    """

    name: ClassVar[str] = "uniform-frames"
    summary: ClassVar[str] = "whole frames at even distances, an even grid in images (baseline for videos)"
    site: ClassVar[Site | None] = Site("input")
    reads_frames: ClassVar[bool] = True

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True in the chosen frames."""
        mask = torch.zeros(view.valid.shape, dtype=torch.bool)
        facts = zip(view.grids, view.images, shown_frames(view), alive_tokens(view), view.keep.tolist(), strict=True)
        for b, (grids, images, frames, alive, keep) in enumerate(facts):
            mask[b, list(_sample_tokens(grids, images, frames, alive, min(keep, sum(alive))))] = True
        return mask.to(view.valid.device)


@lru_cache(maxsize=256)
def _sample_tokens(
    grids: tuple[tuple[int, int], ...],
    images: tuple[int, ...],
    frames: tuple[int | None, ...],
    alive: tuple[int, ...],
    n: int,
) -> tuple[int, ...]:
    """Which of the alive tokens of a sample stay, numbered through the sample.

    Args:
        grids, images, frames: as in a view.
        alive: tokens of each grid that are still there.
        n: how many stay, at most sum(alive).
    """
    numbers = frame_numbers(images, frames)
    members: list[list[int]] = [[] for _ in film_numbers(images, numbers)]
    for grid, (frame, _) in enumerate(numbers):
        members[frame].append(grid)
    films: dict[int, list[list[int]]] = {}
    for film, mine in zip(film_numbers(images, numbers), members, strict=True):
        if sum(alive[grid] for grid in mine):
            films.setdefault(film, []).append(mine)
    sizes = [sum(alive[grid] for mine in film for grid in mine) for film in films.values()]
    kept: list[int] = []
    for film, share in zip(films.values(), split_in_proportion(n, sizes), strict=True):
        for mine, count in _shares([sum(alive[grid] for grid in each) for each in film], share):
            chosen = film[mine]
            first = sum(alive[: chosen[0]])
            cells = sample_cells(tuple(grids[grid] for grid in chosen), tuple(alive[grid] for grid in chosen), count)
            kept += [first + token for token in cells.centre]
    return tuple(kept)


def _shares(sizes: Sequence[int], n: int) -> list[tuple[int, int]]:
    """(frame, tokens) of the frames that a film of frames of these sizes keeps of `n` tokens, in order."""
    total = len(sizes)
    for number in range(1, total + 1):
        picked = [(2 * i + 1) * total // (2 * number) for i in range(number)]
        if sum(sizes[frame] for frame in picked) >= n:
            break
    else:
        return []
    shares = []
    for frame in picked:
        count = min(sizes[frame], n)
        shares.append((frame, count))
        n -= count
    return [(frame, count) for frame, count in shares if count]
