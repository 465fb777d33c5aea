"""Rows of other libraries: attached to module trees of their own, timed in turn with the unpruned model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from vtprune.bench.measure import Decoder, Prefill, Started, shared_copy
from vtprune.bench.measured import measure_cells
from vtprune.bench.rivals.base import Inputs, Rival, installed_version, visual_tokens, why_not
from vtprune.bench.rows import UNPRUNED, Progress, compare_times, is_all
from vtprune.errors import BudgetError

__all__ = ["rival_rows"]

# whatever the code of others may raise on a host that it was not written for
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Prefill(Prefill):
    """A prefill that the library runs. It is attached behind the split at the tower, which it may copy."""

    start: Callable[[], Started]

    def __call__(self) -> Started:
        with torch.no_grad():
            self.last = self.start()
        return self.last


@dataclass
class _Cell:
    """The unpruned model (`kept` is None), or the library at one budget."""

    model: Any
    prefill: Prefill
    keep: int | float | None = None
    kept: int | None = None

    def decoder(self, inputs: Inputs, steps: int) -> Decoder:
        start = self.prefill if isinstance(self.prefill, _Prefill) else None
        return Decoder(self.model, inputs, steps, start)


def rival_rows(
    rival: Rival,
    model: Any,
    inputs: Inputs,
    keeps: Sequence[int | float],
    rounds: int,
    decode_steps: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time one library: a JSON-ready row a budget, or one that says why it was skipped.

    Args:
        rival: the library.
        model: a model that has not run yet; it is not touched.
        inputs: the batch.
        keeps: budgets as for `vtprune.prune`; keep = 1.0 is left out.
        rounds: timed calls of each cell.
        decode_steps: tokens in one timed decode call.
        progress: called with the name after every timed call.
    """
    version = installed_version(rival)
    about = {"version": version, "requires": rival.requires, "does": rival.does, "budget": rival.budget}
    shared: dict[str, Any] = {"rival": {**about, "notes": list(rival.notes)}, "proved": False}
    problem = why_not(rival, version, model, inputs)
    if problem is not None:
        return [{**_skipped(None, problem), **shared}]
    tree = shared_copy(model)
    cells = {UNPRUNED: _Cell(tree, Prefill(tree, inputs))}
    rows: list[dict[str, Any]] = []
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about their use of the host
            for keep in (k for k in keeps if not is_all(k)):
                try:
                    cells[str(keep)] = _attached(stack, rival, model, inputs, keep)
                except _FAILURES as error:
                    rows.append(_skipped(keep, _failure(rival, error)))
            if len(cells) > 1:
                rows = [*_time(rival, cells, inputs, rounds, decode_steps, progress), *rows]
    except _FAILURES as error:
        rows = [_skipped(None, _failure(rival, error))]
    return [{**row, **shared} for row in rows]


def _skipped(keep: int | float | None, reason: str) -> dict[str, Any]:
    return {"keep": keep, "possible": False, "floor": None, "reason": f"skipped: {reason}"}


def _failure(rival: Rival, error: BaseException) -> str:
    if isinstance(error, BudgetError):
        return str(error)
    told = f"{type(error).__name__}: {str(error).rstrip('.')}"
    if isinstance(error, ModuleNotFoundError):
        return f"not complete, {told}. To install it: {rival.install}"
    if isinstance(error, ImportError):
        told = told.replace(f" ({error.path})", "")  # rows are shared between machines
    return f"failed on transformers {transformers.__version__} with {told}"


def _attached(stack: ExitStack, rival: Rival, model: Any, inputs: Inputs, keep: int | float) -> _Cell:
    """The library on a tree of its own; tried once, prefill and one step."""
    visual = visual_tokens(model, inputs)[0]
    kept = max(1, round(keep * visual)) if isinstance(keep, float) else keep
    if kept > visual:
        raise BudgetError(f"{kept} visual tokens are to be kept, and the prompt has {visual}")
    tree = shared_copy(model)
    prefill = _Prefill(tree, inputs)
    prefill.start = stack.enter_context(rival.attach(tree, inputs, kept))
    cell = _Cell(tree, prefill, keep, kept)
    cell.decoder(inputs, 1)()
    return cell


def _time(
    rival: Rival, cells: dict[str, _Cell], inputs: Inputs, rounds: int, decode_steps: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """Rows of all cells but the unpruned one."""

    def tell(cell: str) -> None:
        if progress is not None:
            progress(rival.name)

    measured = measure_cells(cells, lambda cell: cell.decoder(inputs, decode_steps), rounds, tell)
    full = measured[UNPRUNED]
    visual = visual_tokens(cells[UNPRUNED].model, inputs)
    return [
        {
            "keep": cell.keep,
            "possible": True,
            "visual_tokens": visual,
            "kept_tokens": cell.kept,
            **compare_times("prefill", measured[key].decoder, full.decoder),
            **compare_times("total", measured[key].total, full.total),
            "prefill_flop_ratio": rival.flop_ratio,
            **measured[key].beside(full, decode_steps),
        }
        for key, cell in cells.items()
        if key != UNPRUNED
    ]
