"""Which images belong to which sample: placeholders in the prompts against images in the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.layout import ImageGrid

__all__ = ["Grids", "deal_images"]

Grids = tuple[ImageGrid, ...]
"""The grids of one image (or video), in the order of their tokens."""


def deal_images(
    kinds: dict[int, Tensor], visual: Tensor, carried: dict[int, list[Grids]], counts: list[int]
) -> tuple[tuple[Grids, ...], ...]:
    """Give every sample its images, in the order of its placeholders.

    Args:
        kinds: for each placeholder token id, [B, N] True where it stands.
        visual: [B, N] True where any of them stands.
        carried: for each placeholder token id, the grids of each image of the call.
        counts: placeholders of each sample.

    Raises:
        InputError: if placeholders and images do not match.
    """
    waiting: dict[int, list[tuple[int, Grids]]] = {}
    for token, images in carried.items():
        have = sum(grid.tokens for grids in images for grid in grids)
        _check_total(have, kinds[token].sum(1).tolist() if len(kinds) > 1 else counts, images)
        waiting[token] = [(sum(grid.tokens for grid in grids), grids) for grids in images][::-1]
    used = [token for token, images in waiting.items() if images]
    result: list[tuple[Grids, ...]] = []
    for b, count in enumerate(counts):
        # with one kind of placeholder there is no order to read from the device
        order = torch.stack([kinds[t][b][visual[b]] for t in used]).long().argmax(0).tolist() if len(used) > 1 else []
        mine: list[Grids] = []
        at = 0
        while at < count:
            kind = used[order[at]] if order else used[0]
            size, grids = waiting[kind].pop() if waiting[kind] else (0, ())
            if not size or at + size > count or any(used[k] != kind for k in order[at : at + size]):
                raise InputError(
                    f"sample {b} has {count} image tokens, which do not make whole images (after {at} of them the next "
                    f"image has {size}). Do not split a prompt inside an image (prefill_chunk_size must be None)."
                )
            mine.append(grids)
            at += size
        result.append(tuple(mine))
    return tuple(result)


def _check_total(have: int, placeholders: list[int], images: Sequence[Grids]) -> None:
    total = sum(placeholders)
    if total and not images:
        raise InputError(
            f"the prompt has {total} image tokens but the call carries no image. Pass pixel_values, or remove the "
            "image from the prompt."
        )
    if have != total:
        sizes = sorted({sum(grid.tokens for grid in grids) for grids in images})
        each = f"Every image needs {sizes[0]} placeholders" if len(sizes) == 1 else f"The images need {sizes}"
        raise InputError(
            f"the prompts have {total} image tokens in all ({placeholders} a sample) but {len(images)} image(s) give "
            f"{have}. {each}; use the model's processor to build the prompt."
        )
