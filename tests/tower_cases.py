"""Prompts for the tests of cuts inside vision towers."""

from __future__ import annotations

from family_models import CASES, Case, Row

import vtprune

NAMES = [name for name in sorted(CASES) if vtprune.geometry(CASES[name].config()).vision is not None]


def one_picture_each(case: Case) -> tuple[Row, ...]:
    """Prompts with a single unit of the host each, so that a count of tokens has a meaning."""
    sizes = [1, 1] if isinstance(case.sizes[0], int) else (case.tower_sizes or case.sizes)[:2]
    return tuple(Row((("image", size),), 3, 5, seed) for seed, size in enumerate(sizes))


def pictures(row: Row) -> int:
    """What the tower takes for an image of its own; it does not know which of them make a prompt."""
    return sum(size if isinstance(size, int) else 1 for _, size in row.media)


def ragged(case: Case) -> tuple[Row, ...]:
    """Another size in every prompt, two images in one, none in another."""
    first, second, third = case.tower_sizes or case.sizes
    return (
        Row((("image", first),), 3, 5, 0),
        Row((("image", second), ("image", third)), 1, 4, 1),
        Row((), 2, 9, 2),
        Row((("image", third),), 6, 2, 3),
    )


def blocks_of(case: Case) -> tuple[int, int]:
    vision = vtprune.geometry(case.config()).vision
    assert vision is not None
    return vision.blocks, int(vision.has_cls)
