"""Command-line texts -> methods, budgets and plans."""

from __future__ import annotations

from vtprune.errors import BudgetError, InputError, VtpruneError
from vtprune.specs import parse_method, split_methods

__all__ = [
    "KEEP_HELP",
    "METHOD_HELP",
    "pair_keeps",
    "read_keeps",
    "read_methods",
    "read_numbers",
    "require_matplotlib",
]

KEEP_HELP = "Budget: tokens (64), or a fraction (0.25, 25%, 1/4); one a method, separated by commas."
METHOD_HELP = (
    "Method, such as fastv or gemfilter(layer=3), with rules if need be (fastv/dpp/nearest), or several separated by "
    "commas (see `vtprune methods`)."
)


def read_methods(text: str) -> list[str]:
    """`a,b(knob=1)` -> ["a", "b(knob=1)"].

    Raises:
        InputError: if there is none.
        UnknownNameError: if one is not registered.
        PlanError: if its knobs are malformed.
    """
    names = split_methods(text)
    if not names:
        raise InputError(f"--method must name at least one method, got {text!r}. See `vtprune methods`.")
    for name in names:
        parse_method(name)
    return names


def read_keeps(text: str) -> list[int | float]:
    """`288,25%` -> [288, 0.25].

    Raises:
        BudgetError: if a part is not a budget.
    """
    from vtprune.budget import parse_keep

    return [parse_keep(part) for part in text.split(",")]


def pair_keeps(methods: list[str], keep: str | None) -> list[int | float] | None:
    """One budget a method.

    Raises:
        BudgetError: if the numbers of methods and budgets differ.
    """
    if keep is None:
        return None
    keeps = read_keeps(keep)
    if len(keeps) != len(methods):
        raise BudgetError(
            f"--keep must hold one budget a method, got {len(keeps)} ({keep}) for {len(methods)} ({','.join(methods)})."
        )
    return keeps


def read_numbers(option: str, text: str, lowest: int = 1, legal: str = "numbers >= 1") -> list[int]:
    """`1,4,8` -> [1, 4, 8].

    Raises:
        InputError: if a part is not a number from `lowest` on, with what is `legal`.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= lowest for part in parts):
        raise InputError(f"{option} must be {legal}, separated by commas, got {text!r}.")
    return [int(part) for part in parts]


def require_matplotlib(command: str) -> None:
    """Fail before a long run, not after it.

    Raises:
        VtpruneError: with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VtpruneError(f"{command} needs matplotlib ({error}). Run: pip install 'vtprune[eval]'") from error
