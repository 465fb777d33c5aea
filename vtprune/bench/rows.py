"""Cells of the bench: what is timed and counted of each, and the row it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtprune.bench.measure import BareDecoder, Decoder, Prefill
from vtprune.bench.measured import Measured, measure_cells
from vtprune.bench.timing import Timing
from vtprune.cost import prefill_flops, projection_flops
from vtprune.stopwatch import scoring_time

if TYPE_CHECKING:
    from vtprune import Geometry, Report, Verification

__all__ = ["UNPRUNED", "Cell", "Progress", "compare_times", "is_all", "time_cells", "warnings_of"]

UNPRUNED = "unpruned"
_SCORED = 3  # prefills in which scorers are timed
Progress = Callable[[str], object]


@dataclass
class Cell:
    """One model tree of the grid, with its session (None for the unpruned one).

    `oracle` is how far it is from the masked oracle, `unproved` why that could not be asked.
    """

    keep: int | float | None
    session: Any
    prefill: Prefill
    model: Any
    oracle: Verification | None = None
    unproved: str | None = None


def is_all(keep: object) -> bool:
    """True for the share 1.0, not for the int 1 (one token), which equals it."""
    return isinstance(keep, float) and keep == 1.0


def time_cells(
    cells: dict[str, Cell],
    inputs: dict[str, torch.Tensor],
    method: str,
    bare: BareDecoder,
    rounds: int,
    decode_steps: int,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    """Time the cells of one method, the unpruned model among them, in turn; yields a row for each pruned one.

    Args:
        cells: by name; `UNPRUNED` is the unpruned model.
        inputs: the batch.
        method: its name, for `progress`.
        bare: the decoder alone.
        rounds: timed calls of each cell.
        decode_steps: tokens in one timed decode call.
        progress: called with the method after every timed call.
    """

    def tell(name: str) -> None:
        if progress is not None:
            progress(method)

    measured = measure_cells(cells, lambda cell: Decoder(cell.model, inputs, decode_steps), rounds, tell)
    full = measured[UNPRUNED]
    for name, cell in cells.items():
        if cell.session is None:
            continue
        mine, report = measured[name], cell.session.report
        # nothing is scored where nothing is dropped
        scoring = 0.0 if is_all(cell.keep) else _scoring(cell)
        row: dict[str, Any] = {
            "keep": cell.keep,
            "possible": True,
            "identical": True if is_all(cell.keep) else None,
            "plan": cell.session.plan.to_dict(),
            "oracle_error": None if cell.oracle is None else cell.oracle.error,
            "oracle_control": None if cell.oracle is None else cell.oracle.control,
            **_tokens_and_times(report, mine, full),
            **mine.beside(full, decode_steps),
            "scoring_ms": scoring * 1e3,
            "scoring_share": scoring / mine.total.median_s,
            "bare_ratio": bare.ratio(_rows_per_layer(report), _asked(cell.session.geometry, report), tell),
            "kv_bytes_alive": mine.kv_alive,
            "kv_bytes_alive_full": full.kv_alive,
            "kv_bytes_counted": report.kv_bytes,
        }
        row["bare_quotient"] = row["prefill_flop_ratio"] / row["bare_ratio"]
        row["warnings"] = [*warnings_of(row), *([f"not proved: {cell.unproved}"] if cell.unproved else [])]
        yield row


def _tokens_and_times(report: Report, mine: Measured, full: Measured) -> dict[str, Any]:
    """What was kept, and times and FLOPs of the decoder's prefill and of the whole call."""
    whole, whole_full = report.flops + report.vision_flops, report.flops_full + report.vision_flops_full
    return {
        "visual_tokens": list(report.visual_tokens),
        "average_tokens": list(report.average_tokens),
        **_compare("prefill", mine.decoder, full.decoder, report.flops, report.flops_full),
        **_compare("total", mine.total, full.total, whole, whole_full),
    }


def _rows_per_layer(report: Report) -> list[int]:
    """Rows that enter each decoder layer: of the sample that has most, to which the others are padded."""
    samples = [
        [text + n for n in tokens] for text, tokens in zip(report.text_kept, report.tokens_per_layer, strict=True)
    ]
    return [max(layer) for layer in zip(*samples, strict=True)]


def _asked(geometry: Geometry, report: Report) -> list[tuple[int, float]]:
    """Rows, and how much of a decoder layer they passed only to be asked: see `Report.asked`."""
    parts: list[tuple[int, float]] = []
    for layers, rows in report.asked:
        projections = projection_flops(geometry, rows) / prefill_flops(geometry, [rows])
        parts.append((rows, layers + projections))
    return parts


def _scoring(cell: Cell) -> float:
    """Seconds of a prefill that scorers take, tower and decoder together; the smallest of three."""
    found: list[float] = []
    for _ in range(_SCORED):
        with scoring_time() as watch:
            cell.prefill()
        found.append(watch.seconds)
    cell.prefill.forget()
    return min(found)


def _compare(name: str, pruned: Timing, full: Timing, flops: int, flops_full: int) -> dict[str, Any]:
    """Times and FLOPs of one part. `quotient`: the speed-up as a share of what the FLOP count allows."""
    times = compare_times(name, pruned, full)
    flop_ratio = flops / flops_full
    return {
        **times,
        f"{name}_flops": flops,
        f"{name}_flops_full": flops_full,
        f"{name}_flop_ratio": flop_ratio,
        f"{name}_quotient": flop_ratio / times[f"{name}_ratio"],
    }


def compare_times(name: str, pruned: Timing, full: Timing) -> dict[str, Any]:
    """Milliseconds of one part, their spread, and their ratio."""
    return {
        f"{name}_ms": pruned.median_s * 1e3,
        f"{name}_ms_p20_p80": [pruned.p20_s * 1e3, pruned.p80_s * 1e3],
        f"{name}_ms_full": full.median_s * 1e3,
        f"{name}_ms_full_p20_p80": [full.p20_s * 1e3, full.p80_s * 1e3],
        f"{name}_ratio": pruned.median_s / full.median_s,
    }


def warnings_of(row: dict[str, Any]) -> list[str]:
    """What a reader of the row must not overlook."""
    found = []
    pruned = not is_all(row["keep"])
    if pruned and row["total_ratio"] > 1.0:
        found.append(f"slower than not pruning: {row['total_ratio']:.2f} x the unpruned prefill, tower included")
    if pruned and row["peak_bytes"] > row["peak_bytes_full"]:
        found.append(f"peak memory rises: {row['peak_bytes'] / row['peak_bytes_full']:.2f} x the unpruned prefill")
    if row["kv_bytes"] != row["kv_bytes_counted"]:
        found.append(f"the cache holds {row['kv_bytes']} bytes, counted were {row['kv_bytes_counted']}")
    if row["kv_bytes_alive"] > row["kv_bytes"]:
        full = row["kv_bytes_alive_full"] / row["kv_bytes_full"]
        found.append(
            f"the cache keeps {row['kv_bytes_alive'] / row['kv_bytes']:.2f} x its bytes alive behind views, unpruned "
            f"{full:.2f} x"
        )
    return found
