"""How commands print: a console, token counts as runs, numbers with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console

__all__ = ["byte_text", "console", "flop_text", "layers_text", "share_text"]


def console() -> Console:
    """A console on the present stdout; without a terminal, wide enough that tables keep their rows."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=160)


def layers_text(tokens: Sequence[int]) -> str:
    """Runs of equal counts: (576, 576, 64, 64) -> `layers 0-1: 576, 2-3: 64`."""
    runs: list[str] = []
    for count, group in groupby(enumerate(tokens), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        runs.append(f"{span}: {count}")
    return "layers " + ", ".join(runs)


def _scaled(value: float, base: float, units: Iterable[str]) -> str:
    names = list(units)
    for name in names[:-1]:
        if abs(value) < base:
            return f"{value:.4g} {name}"
        value /= base
    return f"{value:.4g} {names[-1]}"


def flop_text(flops: float) -> str:
    """FLOPs with a decimal prefix."""
    return _scaled(float(flops), 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def byte_text(count: float) -> str:
    """Bytes with a binary prefix."""
    return _scaled(float(count), 1024.0, ("B", "KiB", "MiB", "GiB"))


def share_text(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`, or a dash if there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
