"""Where Triton may run: it is optional, needs a CUDA device, and has an interpreter that tests use on the CPU.

vtprune itself imports no Triton before the first launch: kernels live in `<op>_triton.py`, which only launches import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import KernelError

__all__ = ["check_triton", "has_triton", "interpreted", "launch", "recording", "runs_triton"]

_FOUND = importlib.util.find_spec("triton") is not None
# takes launches instead of a device, see `recording`
_recorders: list[Callable[..., None]] = []


def has_triton() -> bool:
    """Triton is installed. PyTorch's builds for CUDA on Linux bring it; macOS and builds for the CPU do not."""
    return _FOUND


def interpreted() -> bool:
    """Triton's interpreter is on, so that kernels run on the CPU, slowly."""
    return _FOUND and os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(tensors: Sequence[Tensor]) -> bool:
    """A launch on these tensors would work: all lie on one CUDA device, or the interpreter is on."""
    if not _FOUND or not tensors or any(t.device != tensors[0].device for t in tensors):
        return False
    return tensors[0].is_cuda or interpreted()


def check_triton(tensors: Sequence[Tensor]) -> None:
    """Refuse `impl="triton"` where it cannot run; a name is honoured or refused.

    Raises:
        KernelError: if Triton is missing, or a tensor lies where it cannot run.
    """
    if not _FOUND:
        raise KernelError(
            'impl="triton" needs the package triton, which is not installed. PyTorch\'s Linux builds for CUDA bring '
            'it; otherwise run `pip install triton`, or use impl="torch" or "auto".'
        )
    if not runs_triton(tensors):
        devices = ", ".join(sorted({str(t.device) for t in tensors})) or "no device"
        raise KernelError(
            f'impl="triton" needs all tensors on one CUDA device, got {devices}. Move them there, or use impl="torch" '
            'or "auto". (With TRITON_INTERPRET=1 set before Python starts, Triton runs on the CPU, for tests.)'
        )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a Triton kernel on a grid, on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _recorders:
        _recorders[-1](kernel, grid, *args, **constants)
        return
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    # Triton launches on the current device, which need not be that of the tensors where a model lies on several
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **constants)


class recording:
    """Context in which launches go to `recorder(kernel, grid, *args, **constants)` and not to a device."""

    def __init__(self, recorder: Callable[..., None]) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        _recorders.append(self._recorder)

    def __exit__(self, *_: object) -> None:
        _recorders.pop()
