"""The grid of `vtprune bench`: methods x budgets on one model and one batch, against the unpruned model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtprune.bench.measure import BareDecoder, Prefill, shared_copy
from vtprune.bench.provenance import provenance
from vtprune.bench.rivals import RIVALS, rival_rows
from vtprune.bench.rows import UNPRUNED, Cell, Progress, is_all, time_cells
from vtprune.errors import BudgetError, InputError, UnknownNameError, UnsupportedModelError, UntrainedError
from vtprune.specs import parse_chain, row_chain

if TYPE_CHECKING:
    from vtprune import Verification

__all__ = ["BenchConfig", "run_bench"]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        methods: names of methods, or chains that take the row's budget in one member (see `vtprune.specs`).
        keeps: budgets beside 1.0, which is always measured (as the overhead of being attached, every member of a chain
            at 1.0).
        batch_size: samples in the batch, each with its own text and image.
        text_tokens: tokens a sample that are not visual (random presets only).
        images: images a sample.
        rounds: timed calls of each cell; the median counts.
        decode_steps: tokens in one timed decode call.
        basis: what a budget counts, see `vtprune.prune`.
        seed: of random weights' inputs.
        against: other libraries to time beside the methods, see `vtprune.bench.rivals`.
    """

    methods: tuple[str, ...]
    keeps: tuple[int | float, ...]
    batch_size: int = 1
    text_tokens: int = 64
    images: int = 1
    rounds: int = 7
    decode_steps: int = 8
    basis: str = "average"
    seed: int = 0
    against: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError("bench needs at least one method, got none.")
        for name in ("batch_size", "images", "rounds", "decode_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}.")
        for method in self.methods:
            if row_chain(method).plan is not None:
                raise InputError(f"bench needs a method that can keep everything, not a saved plan, got {method!r}.")
        for name in self.against:
            if name not in RIVALS:
                raise UnknownNameError("library", name, RIVALS)


def run_bench(
    model: Any, inputs: dict[str, torch.Tensor], config: BenchConfig, progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Measure the grid; yields one JSON-ready row a cell, as soon as its method is done.

    The cells of one method and the unpruned model are timed in turn. Every cell runs on a module tree of its own over
    the same weights. No row comes from a method whose keep = 1.0 logits are not bit-identical to the unpruned ones, nor
    from a cell that is not the unpruned model with the same tokens hidden (`vtprune.verify`, on this very batch).

    Args:
        model: a supported model that has not run yet; it is not touched.
        inputs: the batch, with `input_ids`, `attention_mask` and the image tensors.
        config: the grid.
        progress: called with the method's name after every timed call.
    """
    shared = {"config": asdict(config), **provenance(model.device)}
    batch, length = inputs["input_ids"].shape
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    text = inputs["attention_mask"].sum(1) - visual
    prompt = {"visual_tokens": int(visual.max()), "text_tokens": int(text.max())}
    bare = BareDecoder(shared_copy(model), batch, length, config.rounds)
    for method in config.methods:
        for row in _run_method(model, inputs, config, method, bare, progress):
            yield {"kind": "bench", "method": method, **row, "prompt": prompt, **shared}
    for name in config.against:
        timing = (config.rounds, config.decode_steps)
        for row in rival_rows(RIVALS[name], model, inputs, config.keeps, *timing, progress):
            yield {"kind": "rival", "method": name, **row, "prompt": prompt, **shared}


def _attach(model: Any, inputs: dict[str, torch.Tensor], config: BenchConfig, method: str, keep: float | None) -> Cell:
    import vtprune

    tree = shared_copy(model)
    prefill = Prefill(tree, inputs)
    # all tokens stay only if no member of a chain drops any
    methods = list(parse_chain(method).methods) if is_all(keep) else method
    return Cell(keep, vtprune.prune(tree, methods, keep=keep, basis=config.basis), prefill, tree)


def _run_method(
    model: Any,
    inputs: dict[str, torch.Tensor],
    config: BenchConfig,
    method: str,
    bare: BareDecoder,
    progress: Progress | None,
) -> Iterator[dict[str, Any]]:
    tree = shared_copy(model)
    full = Cell(None, None, Prefill(tree, inputs), tree)
    cells: dict[str, Cell] = {UNPRUNED: full}
    refused: list[dict[str, Any]] = []
    chain = row_chain(method)
    # a method that takes no budget decides by itself, and has one cell
    budgets = [k for k in config.keeps if not is_all(k)] if any(chain.open) else [None]
    for keep in (1.0, *budgets):
        try:
            cell = _attach(model, inputs, config, method, keep)
            cell.prefill()  # a budget in tokens can turn out impossible only once the prompt is known
        except BudgetError as error:
            refused.append(_refused(keep, str(error), floor=error.floor))
            continue
        except UntrainedError as error:
            yield _refused(None, str(error), status="not trained")
            return
        if not is_all(keep):
            cell.oracle, problem = _verified(model, inputs, config, method, keep)
            if problem is not None and cell.oracle is not None:
                refused.append({**_refused(keep, problem), "exact": False})
                continue
            cell.unproved = problem
        cells[str(keep)] = cell
    attached = cells.get("1.0")
    identical = attached is None or _same_logits(full.model, attached.model, inputs)
    if not identical:
        reason = "logits at keep = 1.0 differ from the unpruned model: not measured"
        yield {**_refused(1.0, reason), "identical": False}
        return
    yield from time_cells(cells, inputs, method, bare, config.rounds, config.decode_steps, progress)
    yield from refused


def _refused(
    keep: float | None, reason: str, *, floor: float | None = None, status: str = "not possible"
) -> dict[str, Any]:
    """A row without figures."""
    return {"keep": keep, "possible": False, "status": status, "floor": floor, "reason": reason}


def _verified(
    model: Any, inputs: dict[str, torch.Tensor], config: BenchConfig, method: str, keep: float | None
) -> tuple[Verification | None, str | None]:
    """The masked oracle on this batch, and what is wrong: with the cell, or (without a result) with the question."""
    import vtprune

    try:
        found = vtprune.verify(shared_copy(model), inputs, method, keep, basis=config.basis)
    except UnsupportedModelError as error:
        return None, str(error)
    if found.exact:
        return found, None
    return found, (
        f"differs from the unpruned model with the same tokens hidden by {found.error:.2g} of the outputs' spread, "
        f"where {found.allowed:.2g} is rounding: not measured"
    )


def _same_logits(one: Any, other: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """True if the logits of every position are the same, bit for bit."""
    with torch.no_grad():
        return torch.equal(one(**inputs).logits, other(**inputs).logits)
