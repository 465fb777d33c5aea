"""Kernels: one tensor operation a file, each with a plain reference, a fast torch path and one public function.

Import the function from its file: `from vtprune.kernels.keep_tokens import keep_tokens`. Its Triton version, if it has
one, lies beside it in `keep_tokens_triton.py` and is reached through the operator `torch.ops.vtprune.keep_tokens`,
which `torch.compile` takes as it is. `kernels()` lists all of them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vtprune.errors import UnknownNameError
from vtprune.kernels.guard import check_triton, runs_triton

T = TypeVar("T")

__all__ = ["Kernel", "Size", "kernels", "pick"]

# "odd": small and no power of two, for tests; "large": the stated shape of tables and timings
Size = Literal["odd", "large"]
# names what "auto" stands for in this process, e.g. "torch" to keep Triton out
_VARIABLE = "VTPRUNE_KERNELS"


@dataclass(frozen=True)
class Kernel:
    """What tests, tables and timings must know about a kernel; each kernel's file has one, named `KERNEL`.

    Attributes:
        run: the public function; takes what `example` returns, and `impl`.
        example: keyword arguments for `run`, from a size, a floating dtype and a device.
        operator: name of the `torch.library` operator.
        operands: what the operator takes, from what `run` takes.
        launch: runs the Triton kernels on what the operator takes; imports Triton.
        others: launches of the same operands that `launch` does not cover, by what they are for.
        shape: the shapes of the "large" example, in words.
        least: bytes that any implementation must read and write, from what `run` takes.
        moved: bytes that the loads and stores of the Triton kernels ask for, caches not counted.
        gradients: names of the arguments through which gradients flow.
        exact: the result is a copy of inputs, so that implementations agree to the last bit.
    """

    run: Callable[..., Any]
    example: Callable[[Size, torch.dtype, str], dict[str, Any]]
    operator: str
    operands: Callable[..., tuple[Any, ...]]
    launch: Callable[..., Any]
    shape: str
    least: Callable[..., int]
    moved: Callable[..., int]
    gradients: tuple[str, ...] = ()
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    exact: bool = False


def kernels() -> dict[str, Kernel]:
    """Every kernel by name: the `KERNEL` of each file of this folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        # <op>_triton.py files import Triton, and hold no record
        if not module.name.endswith("_triton"):
            record = getattr(importlib.import_module(f"{__name__}.{module.name}"), "KERNEL", None)
            if record is not None:
                found[module.name] = record
    return found


def pick(impl: str, table: Mapping[str, T], *tensors: Tensor) -> T:
    """The implementation that a caller asked for by name.

    Args:
        impl: a key of `table`, or "auto". A name is honoured or refused; only "auto" leaves the choice to the kernel:
            "triton" on a CUDA device if Triton is installed, else "torch". The environment variable VTPRUNE_KERNELS
            names another meaning of "auto" for the whole process.
        table: the kernel's implementations by name.
        tensors: what it would run on.

    Raises:
        KernelError: if "triton" cannot run on `tensors`.
        UnknownNameError: if `impl` is neither "auto" nor in `table`.
    """
    if impl == "auto":
        impl = os.environ.get(_VARIABLE, "auto")
    if impl == "auto":
        # the interpreter is far slower than torch, so that "auto" never means it
        return table["triton" if bool(tensors) and tensors[0].is_cuda and runs_triton(tensors) else "torch"]
    if impl not in table:
        raise UnknownNameError("kernel implementation", impl, ("auto", *table))
    if impl == "triton":
        check_triton(tensors)
    return table[impl]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes that the elements of these tensors fill."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
