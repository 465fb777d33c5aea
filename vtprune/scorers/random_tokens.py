"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.errors import PlanError
from vtprune.plan import Site

__all__ = ["Random"]


@METHODS.register("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Keeps a random subset before the decoder, the same one whenever seed and prompt are the same.

    Each sample draws from a CPU generator of its own, seeded by a hash of `seed` and the prompt's token ids. So neither
    the order of the samples nor their batch mates matter, the device does not matter, and the global generators are
    left alone. The images do not enter the hash: one prompt gives the same pattern on every image of the same size.
    For an error bar, vary `seed`.

    Attributes:
        seed: any int.

    Raises:
        PlanError: if `seed` is not an int.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "random tokens before the decoder, seeded by the prompt (baseline)"
    site: ClassVar[Site | None] = Site("input")
    reads_prompt: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise PlanError(f"random seed must be an int, got {self.seed!r}. Pass e.g. seed=1.")

    def score(self, view: TokenView) -> Tensor:
        """[B, V] uniform in [0, 1), one draw for each original token, so that earlier cuts do not shift the others."""
        totals = [sum(rows * cols for rows, cols in grids) for grids in view.grids]
        drawn = torch.zeros(len(totals), max(1, *totals))
        for b, (total, key) in enumerate(zip(totals, view.text_key, strict=True)):
            digest = hashlib.blake2b(repr((self.seed, key)).encode(), digest_size=8).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
            drawn[b, :total] = torch.rand(total, generator=generator)
        return drawn.to(view.original.device).gather(1, view.original.clamp(0, drawn.shape[1] - 1))
