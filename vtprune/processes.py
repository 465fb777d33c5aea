"""Several processes of one command (`accelerate launch`), and one alone just the same."""

from __future__ import annotations

import os
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vtprune.errors import BudgetError, VtpruneError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["from_every", "from_main", "is_main", "new_accelerator", "several_processes", "together"]


def several_processes() -> bool:
    """`accelerate launch` (or torchrun) started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """This is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


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


def from_main(value: Any, accelerator: Accelerator | None) -> Any:
    """The main process's value of a Python object, on every process; None stands for this process alone."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def from_every(value: Any, accelerator: Accelerator) -> list[Any]:
    """Every process's value of a Python object, in order of rank, on every process."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


class together:
    """A block that fails on all processes as soon as it fails on one, so that nobody waits for the broken one.

    Args:
        accelerator: of the processes; None if there is one only, whose errors pass through as they are.

    Raises:
        BudgetError: on every process, if one was raised on some.
        VtpruneError: the same for everything else, with the traceback.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._accelerator is None or self._accelerator.num_processes == 1:
            return
        problem = None
        if error is not None:
            text = str(error) if isinstance(error, BudgetError) else "".join(traceback.format_exception(error))
            problem = (isinstance(error, BudgetError), text, getattr(error, "floor", None))
        for rank, found in enumerate(from_every(problem, self._accelerator)):
            if found is not None:
                budget, text, floor = found
                raise BudgetError(text, floor=floor) if budget else VtpruneError(f"process {rank} broke:\n{text}")
