"""The rest leaves: what every method does that says nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.rules import REMAINDERS, Remainder

__all__ = ["Drop"]


@REMAINDERS.register("drop")
@dataclass(frozen=True)
class Drop(Remainder):
    """Tokens that are not selected leave, also on a method that would merge them."""

    name: ClassVar[str] = "drop"
    summary: ClassVar[str] = "leaves"
    merges: ClassVar[bool] = False
