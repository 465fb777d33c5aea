"""Reading the list of budgets of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.budget import parse_keep
from vtprune.errors import BudgetError

__all__ = ["OWN", "SweepKeep", "parse_keeps"]


@dataclass(frozen=True)
class SweepKeep:
    """A budget of a sweep: what the user wrote, and how it was read (float: share, int: tokens, None: its own)."""

    text: str
    value: int | float | None

    @property
    def is_all(self) -> bool:
        """True for the unpruned run."""
        return isinstance(self.value, float) and self.value == 1.0

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.text} = what the method decides"
        if self.is_all:
            return f"{self.text} = all visual tokens (the unpruned model)"
        if isinstance(self.value, float):
            return f"{self.text} = {self.value:.4g} of the visual tokens"
        return f"{self.text} = {self.value} visual token{'s' if self.value > 1 else ''}"


OWN = SweepKeep("own", None)
"""No budget: the method decides by itself."""


def parse_keeps(text: str) -> list[SweepKeep]:
    """Read `"1,1/2,25%,64"`.

    In a sweep `1` means all tokens, as in the row 1, 1/2, 1/4; a single token is written `1t` (and `64t` is `64`).

    Raises:
        BudgetError: if an entry is malformed, or the list is empty.
    """
    keeps: list[SweepKeep] = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        count = part.removesuffix("t")
        value = 1.0 if part == "1" else parse_keep(count)
        if count != part and not isinstance(value, int):
            raise BudgetError(f"a keep that ends in 't' must be a number of tokens such as '64t', got {part!r}.")
        if all(value != known.value or type(value) is not type(known.value) for known in keeps):
            keeps.append(SweepKeep(part, value))
    if not keeps:
        raise BudgetError(f"keeps must list at least one budget such as '1/2,1/4' or '64', got {text!r}.")
    return keeps
