"""Kernels: one tensor operation a file, each with a plain reference, a fast path and one public function.

Import the function from its file: `from vtprune.kernels.keep_tokens import keep_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from vtprune.errors import UnknownNameError

T = TypeVar("T")

__all__ = ["pick"]


def pick(impl: str, table: Mapping[str, T], auto: str) -> T:
    """The implementation that a caller asked for by name.

    Args:
        impl: a key of `table`, or "auto". A name is honoured or refused; only "auto" leaves the choice to the kernel.
        table: the kernel's implementations by name.
        auto: the key that "auto" stands for in this call.

    Raises:
        UnknownNameError: if `impl` is neither "auto" nor in `table`.
    """
    if impl == "auto":
        return table[auto]
    if impl not in table:
        raise UnknownNameError("kernel implementation", impl, ("auto", *table))
    return table[impl]
