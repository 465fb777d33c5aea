"""Several processes of one command (`accelerate launch`), and one alone just the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["from_every", "from_main", "new_accelerator"]


def new_accelerator(extra: str) -> Accelerator:
    """`accelerate.Accelerator()`: of the processes that `accelerate launch` started, or of this one alone.

    Args:
        extra: of this package, that brings accelerate; for the message.

    Raises:
        VtpruneError: if accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise VtpruneError(f"this needs accelerate ({error}). Run: pip install 'vtprune[{extra}]'") from error
    return Accelerator()


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The main process's value of a Python object, on every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def from_every(value: Any, accelerator: Accelerator) -> list[Any]:
    """Every process's value of a Python object, in order of rank, on every process."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
