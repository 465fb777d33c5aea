"""The grid of `vtprune bench`: methods x budgets on one model and one batch, against the unpruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtprune.bench.measure import BareDecoder, Decoder, Prefill, cache_bytes, peak_bytes, shared_copy
from vtprune.bench.provenance import provenance
from vtprune.bench.timing import Timing, interleaved_medians, summarise
from vtprune.cost import prefill_flops, projection_flops
from vtprune.errors import BudgetError, InputError

if TYPE_CHECKING:
    from vtprune import Report, Session

__all__ = ["BenchConfig", "is_all", "run_bench"]

_FULL = "unpruned"
Progress = Callable[[str], object]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        methods: names of methods.
        keeps: budgets beside 1.0, which is always measured (as the overhead of being attached).
        batch_size: samples in the batch, each with its own text and image.
        text_tokens: tokens a sample that are not visual (random presets only).
        rounds: timed calls of each cell; the median counts.
        decode_steps: tokens in one timed decode call.
        basis: what a budget counts, see `vtprune.prune`.
        seed: of random weights' inputs.
    """

    methods: tuple[str, ...]
    keeps: tuple[int | float, ...]
    batch_size: int = 1
    text_tokens: int = 64
    rounds: int = 7
    decode_steps: int = 8
    basis: str = "average"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError("bench needs at least one method, got none.")
        for name in ("batch_size", "rounds", "decode_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}.")


@dataclass
class _Cell:
    """One model tree of the grid, with its session (None for the unpruned one)."""

    keep: int | float | None
    session: Any
    prefill: Prefill
    model: Any


def is_all(keep: object) -> bool:
    """True for the share 1.0, not for the int 1 (one token), which equals it."""
    return isinstance(keep, float) and keep == 1.0


def run_bench(
    model: Any, inputs: dict[str, torch.Tensor], config: BenchConfig, progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Measure the grid; yields one JSON-ready row a cell, as soon as its method is done.

    The cells of one method and the unpruned model are timed in turn. Every cell runs on a module tree of its own over
    the same weights. A method whose keep = 1.0 logits are not bit-identical to the unpruned ones is refused.

    Args:
        model: a supported model that has not run yet; it is not touched.
        inputs: the batch, with `input_ids`, `attention_mask` and the image tensors.
        config: the grid.
        progress: called with the method's name after every timed call.
    """
    source = provenance(model.device)
    batch, length = inputs["input_ids"].shape
    bare = BareDecoder(shared_copy(model), batch, length, config.rounds)
    for method in config.methods:
        for row in _run_method(model, inputs, config, method, bare, progress):
            yield {"kind": "bench", "method": method, **row, "config": asdict(config), **source}


def _attach(model: Any, inputs: dict[str, torch.Tensor], config: BenchConfig, method: str, keep: float) -> _Cell:
    import vtprune

    tree = shared_copy(model)
    prefill = Prefill(tree, inputs)
    return _Cell(keep, vtprune.prune(tree, method, keep=keep, basis=config.basis), prefill, tree)


def _run_method(
    model: Any,
    inputs: dict[str, torch.Tensor],
    config: BenchConfig,
    method: str,
    bare: BareDecoder,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    tree = shared_copy(model)
    full = _Cell(None, None, Prefill(tree, inputs), tree)
    cells: dict[str, _Cell] = {_FULL: full}
    refused: list[dict[str, Any]] = []
    for keep in (1.0, *(k for k in config.keeps if not is_all(k))):
        try:
            cell = _attach(model, inputs, config, method, keep)
            cell.prefill()  # a budget in tokens can turn out impossible only once the prompt is known
        except BudgetError as error:
            refused.append({"keep": keep, "possible": False, "floor": error.floor, "reason": str(error)})
        else:
            cells[str(keep)] = cell
    attached = cells.get("1.0")
    identical = attached is None or _same_logits(full.model, attached.model, inputs)
    if not identical:
        reason = "logits at keep = 1.0 differ from the unpruned model: not measured"
        yield {"keep": 1.0, "possible": False, "identical": False, "floor": None, "reason": reason}
        return
    yield from _time_cells(cells, inputs, config, method, bare, progress)
    yield from refused


def _same_logits(one: Any, other: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """True if the logits of every position are the same, bit for bit."""
    with torch.no_grad():
        return torch.equal(one(**inputs).logits, other(**inputs).logits)


def _time_cells(
    cells: dict[str, _Cell],
    inputs: dict[str, torch.Tensor],
    config: BenchConfig,
    method: str,
    bare: BareDecoder,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    def tell(name: str) -> None:
        if progress is not None:
            progress(method)

    for cell in cells.values():
        cell.prefill.tower_s.clear()
    total = interleaved_medians({n: c.prefill for n, c in cells.items()}, config.rounds, warmup=1, progress=tell)
    towers = {n: c.prefill.tower_s[-config.rounds :] for n, c in cells.items()}
    decoder = {n: summarise([a - b for a, b in zip(total[n].times_s, towers[n], strict=True)]) for n in cells}
    reports = {n: c.session.report for n, c in cells.items() if c.session is not None}
    kv = {n: cache_bytes(c.prefill.last.past_key_values) for n, c in cells.items()}
    for cell in cells.values():
        cell.prefill.forget()
    peak = {n: _peak(c) for n, c in cells.items()}
    steps = {n: Decoder(c.model, inputs, config.decode_steps) for n, c in cells.items()}
    decode = interleaved_medians(steps, config.rounds, warmup=1, progress=tell)

    for name, cell in cells.items():
        if cell.session is None:
            continue
        report = reports[name]
        bare_ratio = bare.ratio(_rows_per_layer(report), _asked(cell.session, report), tell)
        row: dict[str, Any] = {
            "keep": cell.keep,
            "possible": True,
            "identical": True if is_all(cell.keep) else None,
            "plan": cell.session.plan.to_dict(),
            "visual_tokens": list(report.visual_tokens),
            "average_tokens": list(report.average_tokens),
            **_compare("prefill", decoder[name], decoder[_FULL], report.flops, report.flops_full),
            **_compare(
                "total",
                total[name],
                total[_FULL],
                report.flops + report.vision_flops,
                report.flops_full + report.vision_flops_full,
            ),
            "bare_ratio": bare_ratio,
            "bare_quotient": report.flops / report.flops_full / bare_ratio,
            "decode_ms": decode[name].median_s * 1e3 / config.decode_steps,
            "decode_ms_full": decode[_FULL].median_s * 1e3 / config.decode_steps,
            "decode_ratio": decode[name].median_s / decode[_FULL].median_s,
            "peak_bytes": peak[name],
            "peak_bytes_full": peak[_FULL],
            "kv_bytes": kv[name][0],
            "kv_bytes_full": kv[_FULL][0],
            "kv_bytes_alive": kv[name][1],
            "kv_bytes_alive_full": kv[_FULL][1],
            "kv_bytes_counted": report.kv_bytes,
        }
        row["warnings"] = _warnings(row)
        yield row


def _rows_per_layer(report: Report) -> list[int]:
    """Rows that enter each decoder layer: of the sample that has most, to which the others are padded."""
    samples = [
        [text + n for n in tokens] for text, tokens in zip(report.text_kept, report.tokens_per_layer, strict=True)
    ]
    return [max(layer) for layer in zip(*samples, strict=True)]


def _asked(session: Session, report: Report) -> list[tuple[int, float]]:
    """Rows, and how much of a decoder layer they passed only to be asked: the first passes of restarts, and the
    queries, keys and values of layers that look ahead. Of the sample that has most.
    """
    text, visual = max(zip(report.text_tokens, report.visual_tokens, strict=True), key=sum)
    shape = session.geometry.for_prompt(visual, text, 1)
    passes = session.plan.passes(shape.entering, visual)
    asked = [*passes, *session.plan.looks_ahead(shape.entering, visual)]
    parts = [(text + n, float(layers)) for layers, n in passes if layers]
    for _, n in asked:
        rows = text + n
        parts.append((rows, projection_flops(shape, rows) / prefill_flops(shape, [rows])))
    return parts


def _peak(cell: _Cell) -> int:
    peak = peak_bytes(cell.prefill, cell.model.device)
    cell.prefill.forget()
    return peak


def _compare(name: str, pruned: Timing, full: Timing, flops: int, flops_full: int) -> dict[str, Any]:
    """Times and FLOPs of one part. `quotient`: the speed-up as a share of what the FLOP count allows."""
    ratio = pruned.median_s / full.median_s
    flop_ratio = flops / flops_full
    return {
        f"{name}_ms": pruned.median_s * 1e3,
        f"{name}_ms_p20_p80": [pruned.p20_s * 1e3, pruned.p80_s * 1e3],
        f"{name}_ms_full": full.median_s * 1e3,
        f"{name}_ms_full_p20_p80": [full.p20_s * 1e3, full.p80_s * 1e3],
        f"{name}_ratio": ratio,
        f"{name}_flops": flops,
        f"{name}_flops_full": flops_full,
        f"{name}_flop_ratio": flop_ratio,
        f"{name}_quotient": flop_ratio / ratio,
    }


def _warnings(row: dict[str, Any]) -> list[str]:
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
