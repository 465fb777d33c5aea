"""How long scorers take, measured only while somebody asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Stopwatch", "scoring", "scoring_time", "timer"]


def timer() -> float:
    """Seconds of a monotonic clock, once the accelerator, if any, has nothing left to do.

    What `torch.utils.benchmark.timer` does; importing that one pulls in the compiler tool chain.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class Stopwatch:
    """Seconds spent in scorers, and in making what they see, since the watch was started."""

    seconds: float = 0.0


_running: list[Stopwatch] = []
_inside = False


@contextlib.contextmanager
def scoring_time() -> Iterator[Stopwatch]:
    """Add up the time of scorers in this block, in every session of the process.

    An accelerator is waited for before and after each piece, which slows the whole call: what is measured beside it in
    the same block is not the time of an undisturbed call.
    """
    watch = Stopwatch()
    _running.append(watch)
    try:
        yield watch
    finally:
        _running.remove(watch)


@contextlib.contextmanager
def scoring() -> Iterator[None]:
    """What runs in this block is a scorer's; blocks inside others count once."""
    global _inside
    if not _running or _inside:
        yield
        return
    _inside, start = True, timer()
    try:
        yield
    finally:
        _inside, elapsed = False, timer() - start
        for watch in _running:
            watch.seconds += elapsed
