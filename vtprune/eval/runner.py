"""The sweep: methods x budgets over tasks, one loaded model, one session a cell, failures isolated."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError
from vtprune.eval.against import compare, require_reference
from vtprune.eval.cell import Answers, fill_row, run_cell
from vtprune.eval.harness import Harness, quiet
from vtprune.eval.keeps import OWN, SweepKeep
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.progress import Progress
from vtprune.specs import row_chain

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat

__all__ = ["Sweep", "SweepResult", "environment", "run_sweep", "write_predictions"]

_TIMED_BATCH = 8  # enough to fill two cores; timing every cell on larger batches takes longer than the questions


@dataclass(frozen=True)
class Sweep:
    """What to run. Defaults are those of `vtprune eval`.

    Attributes:
        model: what `vtprune.loading.load_model` accepts.
        methods: names of methods, or chains that take the row's budget in one member (see `vtprune.specs`).
        keeps: budgets; those that mean all tokens stand for the unpruned model, which is always run once.
        tasks: lmms-eval task names.
        limit: questions a task.
        batch_size: questions a call.
        seed: of the bundled questions and of the bootstrap.
        basis: what a budget counts, `average` or `final`.
        against: the method that every row is compared with at equal FLOPs, None for no comparison.
        rounds: measurements of each prefill, 0 for no timing.
        device, dtype, attn_implementation: for loading.
        command: how the user started it, kept with the results.

    Raises:
        VtpruneError: if a method is not known, a chain does not take one budget, or `against` cuts inside the model.
    """

    methods: tuple[str, ...]
    keeps: tuple[SweepKeep, ...]
    tasks: tuple[str, ...]
    model: str = "tiny:llava"
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0
    basis: str = "average"
    against: str | None = "random"
    rounds: int = 7
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for method in self.methods:
            row_chain(method)
        if self.against is not None:
            require_reference(self.against)

    def cells(self) -> list[tuple[str, SweepKeep]]:
        """(method, budget) of every pruned cell; a method that can decide by itself has a cell where it does."""
        cells: list[tuple[str, SweepKeep]] = []
        for method in self.methods:
            chain = row_chain(method)
            cells += [(method, keep) for keep in self.keeps if any(chain.open) and not keep.is_all]
            cells += [(method, OWN)] * chain.decides
        return cells


@dataclass
class SweepResult:
    """Rows in order, the unpruned model first, and every answer behind them by row name."""

    rows: list[Row]
    answers: dict[str, Answers] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """Why cells and references broke, by name (a cell whose budget cannot be reached is not among them)."""
        cells = {row.name: row.message for row in self.rows if row.status == "failed"}
        lost = [row.against for row in self.rows if row.against is not None and row.against.message]
        return cells | {f"{other.method} at {other.keep:.4g}, to compare with": other.message for other in lost}


def run_sweep(sweep: Sweep, progress: Progress) -> tuple[SweepResult, Harness, VtpruneChat]:
    """Run every cell.

    The unpruned model must work: its errors are raised. A pruned cell that fails becomes a row that says so.

    Returns:
        the result, and the tasks and the model (with nothing attached) for drawing examples.

    Raises:
        VtpruneError: if lmms-eval is missing, or a task or model is not known.
    """
    progress.start("loading lmms-eval, tasks and model", 1)
    harness = Harness(sweep.tasks, sweep.limit, sweep.seed)
    title = UNPRUNED_ROW
    lm = _load(sweep, lambda count: progress.step(title, count))
    progress.step("loaded")

    def ask(row: Row) -> Answers | None:
        nonlocal title
        title = row.name
        progress.step(title, 0)
        answers = run_cell(row, lm, harness)
        if answers is None:
            progress.step(title, harness.questions)
        return answers

    def begin(runs: int) -> None:
        progress.start(f"{sweep.against} at equal FLOPs", harness.questions * runs)

    run = {"model": sweep.model, "seed": sweep.seed, "limit": sweep.limit, "batch_size": sweep.batch_size}
    run |= {"command": sweep.command, **environment(lm.model)}
    cells = sweep.cells()
    progress.start("questions", harness.questions * (len(cells) + 1))
    result = SweepResult([Row(UNPRUNED_ROW, "1", 1.0, sweep.basis, run=run)])
    baseline = Answers(harness.run(lm), lm.totals)
    fill_row(result.rows[0], baseline, baseline, sweep.seed)
    result.answers[UNPRUNED_ROW] = baseline
    for method, keep in cells:
        if result.rows[-1].method == method and result.rows[-1].status == "not trained":
            progress.step(method, harness.questions)
            continue
        row = Row(method, keep.text, keep.value, sweep.basis, run=run)
        result.rows.append(row)
        answers = ask(row)
        if answers is not None:
            fill_row(row, answers, baseline, sweep.seed)
            result.answers[row.name] = answers
    if sweep.against is not None:
        compare(result.rows, result.answers, sweep.against, sweep.seed, begin, ask)
    lm.detach()
    if sweep.rounds:
        _time(result.rows, lm, harness, sweep, progress)
    return result, harness, lm


def _load(sweep: Sweep, on_batch: Callable[[int], object]) -> VtpruneChat:
    """The model with its processor, nothing attached."""
    from vtprune.eval.asking import default_device
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.loading import load_model

    with quiet():
        loaded = load_model(
            sweep.model,
            device=sweep.device or default_device(),
            dtype=sweep.dtype,
            attn_implementation=sweep.attn_implementation,
        )
    if loaded[1] is None:
        raise InputError(
            f"the model {sweep.model!r} has no processor, so it cannot be asked questions. Use `vtprune bench`."
        )
    return VtpruneChat(loaded=loaded, batch_size=sweep.batch_size, on_batch=on_batch)


def _time(rows: Sequence[Row], lm: VtpruneChat, harness: Harness, sweep: Sweep, progress: Progress) -> None:
    """Prefill medians of every cell that ran, on the first questions of the first task."""
    from vtprune.eval.asking import UNPRUNED, attach_to
    from vtprune.eval.prefill import prefill_timings

    cells = {
        row.name: functools.partial(attach_to, method=row.method, keep=row.keep_value, basis=row.basis)
        for row in rows
        if row.status == "ok" and row.method != UNPRUNED_ROW
    }
    inputs = lm.encode(harness.prompts(lm, sweep.tasks[0], min(sweep.batch_size, _TIMED_BATCH)))
    progress.start("prefill timing", (sweep.rounds + 1) * (len(cells) + 1))
    timings = prefill_timings(lm.model, inputs, cells, sweep.rounds, lambda name: progress.step(f"prefill {name}"))
    full = timings[UNPRUNED].median_s
    for row in rows:
        timing = timings.get(UNPRUNED if row.method == UNPRUNED_ROW else row.name)
        if timing is not None:
            row.prefill_ms = 1000 * timing.median_s
            row.prefill_ratio = timing.median_s / full


def environment(model: Any) -> dict[str, Any]:
    """Versions, device and dtype, to be stored with every result."""
    import torch

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {}
    for package in ("vtprune", "torch", "transformers", "lmms-eval"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "source tree"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }


def write_predictions(result: SweepResult, path: Path) -> None:
    """One JSON object a question and cell: what was answered, and what was kept."""
    rows = {row.name: row for row in result.rows}
    with path.open("w", encoding="utf-8") as file:
        for name, answers in result.answers.items():
            row = rows[name]
            for sample in (sample for samples in answers.samples.values() for sample in samples):
                line = {
                    "method": row.method,
                    "keep": row.keep,
                    "task": sample.task,
                    "doc_id": sample.doc_id,
                    "image_id": sample.image_id,
                    "kind": sample.kind,
                    "question": sample.question,
                    "answer": sample.answer,
                    "prediction": sample.prediction,
                    "score": sample.score,
                    "kept_hash": sample.counts.get("kept_hash"),
                    "visual_tokens": sample.counts.get("visual_tokens"),
                    "average_tokens": sample.counts.get("average_tokens"),
                }
                file.write(json.dumps(line) + "\n")
