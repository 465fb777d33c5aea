"""Wall-clock medians of several callables, taken in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vtprune.errors import InputError
from vtprune.stopwatch import timer

__all__ = ["Timing", "interleaved_medians", "summarise"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable.

    Attributes:
        median_s, p20_s, p80_s: order statistics of `times_s`.
        times_s: one entry a round, in order.
    """

    median_s: float
    p20_s: float
    p80_s: float
    times_s: tuple[float, ...]


def _percentile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the closest ranks."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarise(times_s: list[float]) -> Timing:
    """Median and the 20th and 80th percentile of seconds.

    Raises:
        InputError: if there are none.
    """
    if not times_s:
        raise InputError("cannot summarise 0 timings; measure at least one round.")
    ordered = sorted(times_s)
    return Timing(statistics.median(ordered), _percentile(ordered, 0.2), _percentile(ordered, 0.8), tuple(times_s))


def interleaved_medians(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time every callable once a round, in turn, so that drift of the machine hits all of them alike.

    (`torch.utils.benchmark.Timer.timeit(1)` would run two unmeasured calls before each measured one, and set the
    thread count to 1.)

    Args:
        runs: what to time, by name.
        rounds: measurements of each.
        warmup: untimed calls of each before the first round.
        progress: called with the name after every call.

    Raises:
        InputError: if `rounds` is below 1 or `warmup` below 0.
    """
    if rounds < 1 or warmup < 0:
        raise InputError(f"rounds must be >= 1 and warmup >= 0, got {rounds=}, {warmup=}.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-warmup, rounds):
        # every second round goes backwards: no callable always runs right after the same other one
        for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
            start = timer()
            runs[name]()
            elapsed = timer() - start
            if index >= 0:
                times[name].append(elapsed)
            if progress is not None:
                progress(name)
    return {name: summarise(values) for name, values in times.items()}
