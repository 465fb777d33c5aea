"""Cells timed in turn, whoever made them: what each costs, and the columns that this gives a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vtprune.bench.measure import Prefill, cache_bytes, peak_bytes
from vtprune.bench.timing import Timing, interleaved_medians, summarise

__all__ = ["Measured", "measure_cells"]


class _Timed(Protocol):
    """A cell: a prefill, and the module tree that it runs on."""

    prefill: Prefill
    model: Any


C = TypeVar("C", bound=_Timed)


@dataclass(frozen=True)
class Measured:
    """What one cell cost.

    Attributes:
        total: the whole prefill.
        decoder, tower: its parts; the tower is what `get_image_features` takes.
        decode: one call of `steps` (see `measure_cells`).
        peak: bytes, see `peak_bytes`.
        kv, kv_alive: bytes, see `cache_bytes`.
    """

    total: Timing
    decoder: Timing
    tower: Timing
    decode: Timing
    peak: int
    kv: int
    kv_alive: int

    def beside(self, full: Measured, decode_steps: int) -> dict[str, Any]:
        """Columns of a row that need no count of FLOPs; `full` is the unpruned model."""
        return {
            "tower_ms": self.tower.median_s * 1e3,
            "tower_ms_full": full.tower.median_s * 1e3,
            "decode_ms": self.decode.median_s * 1e3 / decode_steps,
            "decode_ms_full": full.decode.median_s * 1e3 / decode_steps,
            "decode_ratio": self.decode.median_s / full.decode.median_s,
            "peak_bytes": self.peak,
            "peak_bytes_full": full.peak,
            "kv_bytes": self.kv,
            "kv_bytes_full": full.kv,
        }


def measure_cells(
    cells: Mapping[str, C],
    steps: Callable[[C], Callable[[], object]],
    rounds: int,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Measured]:
    """Time the cells in turn, prefill and decoding, and count what they hold.

    Args:
        cells: by name.
        steps: a cell -> what decodes a few tokens after a prefill of its own.
        rounds: timed calls of each; the medians count.
        progress: called with the cell's name after every timed call.
    """
    for cell in cells.values():
        cell.prefill.tower_s.clear()
    total = interleaved_medians({n: c.prefill for n, c in cells.items()}, rounds, warmup=1, progress=progress)
    towers = {n: c.prefill.tower_s[-rounds:] for n, c in cells.items()}
    decoder = {n: summarise([a - b for a, b in zip(total[n].times_s, towers[n], strict=True)]) for n in cells}
    kv = {n: cache_bytes(c.prefill.last.past_key_values) for n, c in cells.items()}
    for cell in cells.values():
        cell.prefill.forget()
    peak: dict[str, int] = {}
    for name, cell in cells.items():
        peak[name] = peak_bytes(cell.prefill, cell.model.device)
        cell.prefill.forget()
    decode = interleaved_medians({n: steps(c) for n, c in cells.items()}, rounds, warmup=1, progress=progress)
    return {
        n: Measured(total[n], decoder[n], summarise(towers[n]), decode[n], peak[n], kv[n][0], kv[n][1]) for n in cells
    }
