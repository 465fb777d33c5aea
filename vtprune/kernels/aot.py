"""Compiles every Triton kernel ahead of time, for GPUs that need not be there, and tells what the compiler made of it.

    python -m vtprune.kernels.aot                          # print the tables
    python -m vtprune.kernels.aot --write docs/kernels.md  # put them between that page's markers

The kernels are launched as they would be on a GPU, on shapes without memory, and a recorder compiles what arrives; so
argument types, alignments and block sizes are those of real calls. Needs Triton, no device and no network.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtprune.errors import KernelError
from vtprune.kernels import kernels
from vtprune.kernels.guard import has_triton, interpreted, recording

__all__ = ["ARCHITECTURES", "Built", "build", "main", "tables"]

ARCHITECTURES = (80, 90)
DTYPES = (torch.bfloat16, torch.float32)
_MARKS = ("<!-- kernels:start -->", "<!-- kernels:end -->")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Built:
    """One compiled kernel.

    Attributes:
        kernel: name of the operation.
        function: name of the Triton function.
        architecture: 80 for sm_80.
        dtype: of the inputs.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        spilled: bytes of a thread that did not fit into registers.
    """

    kernel: str
    function: str
    architecture: int
    dtype: torch.dtype
    registers: int
    shared: int
    spilled: int


class _Target:
    """Stands in for Triton's driver: says what to compile for, and has no device."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._architecture, self._target = architecture, GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def build(architecture: int, dtype: torch.dtype) -> Iterator[Built]:
    """Compile all kernels for one architecture and one dtype of the inputs.

    Raises:
        KernelError: if Triton is missing, or its interpreter is on, which compiles nothing.
    """
    if not has_triton():
        raise KernelError("compiling ahead of time needs the package triton. On Linux: pip install triton.")
    if interpreted():
        raise KernelError("TRITON_INTERPRET=1 turns the compiler off. Unset it and start again.")
    from triton.runtime import driver

    driver.set_active(_Target(architecture))  # type: ignore[arg-type]
    for name, kernel in kernels().items():
        operands = kernel.operands(**kernel.example("large", dtype, "meta"))
        made: dict[str, Any] = {}

        def compile_it(function: Any, grid: tuple[int, ...], *args: Any, made: Any = made, **constants: Any) -> None:
            made[function.__name__] = function.warmup(*args, grid=grid, **constants)

        with recording(compile_it):
            for run in (kernel.launch, *kernel.others.values()):
                run(*operands)
        for function, compiled in made.items():
            registers, stack, static, local = _resources(compiled.asm["cubin"])
            shared = max(static, compiled.metadata.shared)
            yield Built(name, function.strip("_"), architecture, dtype, registers, shared, stack + local)


def _resources(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack, shared and local memory of a binary, from NVIDIA's own tool, which comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    found = _USAGE.findall(text)
    if len(found) != 1:
        raise KernelError(f"cuobjdump printed no line of resources for one kernel, but:\n{text}")
    return tuple(int(n) for n in found[0])


def tables() -> str:
    """Markdown: what the compiler made of every kernel, and how many bytes they move."""
    import triton

    built = [b for arch in ARCHITECTURES for dtype in DTYPES for b in build(arch, dtype)]
    functions = list(dict.fromkeys((b.kernel, b.function) for b in built))
    heads = [f"sm_{arch} {str(dtype).removeprefix('torch.')}" for arch in ARCHITECTURES for dtype in DTYPES]
    lines = [
        f"Triton {triton.__version__}. Registers of a thread / bytes of shared memory of a block / bytes spilled.",
        "",
        f"| kernel | function | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
    ]
    for name, function in functions:
        cells = [
            f"{b.registers} / {b.shared} / {b.spilled}" for b in built if (b.kernel, b.function) == (name, function)
        ]
        lines.append(f"| `{name}` | `{function}` | {' | '.join(cells)} |")
    lines += ["", "| kernel | shape, bfloat16 | must move, MB | moves, MB | ratio |", "|---|---|---|---|---|"]
    for name, kernel in kernels().items():
        inputs = kernel.example("large", torch.bfloat16, "meta")
        least, moved = kernel.least(**inputs), kernel.moved(**inputs)
        lines.append(f"| `{name}` | {kernel.shape} | {least / 1e6:.2f} | {moved / 1e6:.2f} | {moved / least:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the tables between the markers of this page")
    page = parser.parse_args(arguments).write
    text = tables()
    if page is None:
        sys.stdout.write(text)
        return
    whole = page.read_text(encoding="utf-8")
    if any(whole.count(mark) != 1 for mark in _MARKS):
        raise KernelError(f"{page} must hold {_MARKS[0]} and {_MARKS[1]} once each.")
    before, after = whole.split(_MARKS[0])[0], whole.split(_MARKS[1])[1]
    page.write_text(f"{before}{_MARKS[0]}\n{text}{_MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
