"""The sweep: methods x budgets over tasks and seeds, one loaded model, one file a cell, failures isolated."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vtprune.bench.provenance import source_commit
from vtprune.errors import InputError, VtpruneError
from vtprune.eval.against import compare
from vtprune.eval.asker import Asker
from vtprune.eval.cell import Answers, fill_row
from vtprune.eval.harness import Harness, quiet
from vtprune.eval.replaying import Recording
from vtprune.eval.rows import REPLAY, UNPRUNED_ROW, Row
from vtprune.eval.store import CellStore, settings_of
from vtprune.eval.sweep import Sweep, SweepResult
from vtprune.loading import load_config
from vtprune.processes import is_main
from vtprune.progress import Progress

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat

__all__ = ["environment", "load_chat", "run_sweep"]

_TIMED_BATCH = 8  # enough to fill two cores; timing every cell on larger batches takes longer than the questions
# whose prompts of lmms-eval a family is asked with, where a task has several
_PROMPTS_OF = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
}


def run_sweep(
    sweep: Sweep, progress: Progress, store: CellStore | None = None
) -> tuple[SweepResult, Harness, VtpruneChat]:
    """Run every cell that is not in the store yet.

    What breaks is isolated: a task that the unpruned model cannot be asked is left out everywhere, and a pruned cell
    that fails becomes a row that says so. Of several processes each asks its share of the documents, and all of them
    return the same answers; only the main one writes cells and takes times.

    Args:
        sweep: what to run.
        progress: told what is done.
        store: where cells are kept and found again; nowhere, if None.

    Returns:
        the result, and the tasks and the model (with nothing attached) for drawing examples.

    Raises:
        VtpruneError: if lmms-eval is missing, a task or model is not known, or no task at all can be asked.
    """
    progress.start("loading lmms-eval, tasks and model", 1)
    recording = None if sweep.replay is None else Recording(sweep.replay)
    prompts_of = _PROMPTS_OF.get(load_config(sweep.model).model_type)
    options: dict[str, Any] = {"prompts_of": prompts_of, "isolate": True}
    harnesses = {seed: Harness(sweep.tasks, sweep.limit, seed, **options) for seed in sweep.seeds}
    first = harnesses[sweep.seed]
    title = UNPRUNED_ROW
    lm = load_chat(sweep.model, **sweep.loading, on_batch=lambda count: progress.step(title, count))
    progress.step("loaded")

    run, settings = _described(sweep, environment(lm.model))
    asker = Asker(lm, harnesses, store or CellStore(None), settings, recording, lambda n: progress.step(title, n))

    def ask(row: Row) -> Answers | None:
        nonlocal title
        title = row.name
        progress.step(title, 0)
        return asker.answers(row, tasks)

    def begin(runs: int) -> None:
        progress.start(f"{sweep.against} at equal FLOPs", asker.questions(tasks) * runs)

    rows = _rows(sweep, recording, run)
    tasks = asker.tasks
    progress.start("questions", asker.questions(tasks) * len(rows))
    result = SweepResult(rows[:1], broken_tasks=dict(first.problems))
    baseline = ask(rows[0]) if tasks else None
    result.broken_tasks |= rows[0].missing
    if baseline is None:
        problems = result.broken_tasks or {"the unpruned model": rows[0].message}
        raise VtpruneError("no task can be asked:\n" + "\n".join(f"{name}: {text}" for name, text in problems.items()))
    tasks = tuple(baseline.samples)
    fill_row(rows[0], baseline, baseline, sweep.seed)
    result.answers[UNPRUNED_ROW] = baseline
    for row in rows[1:]:
        if result.rows[-1].method == row.method and result.rows[-1].status == "not trained":
            progress.step(row.method, asker.questions(tasks))
            continue
        result.rows.append(row)
        answers = ask(row)
        if answers is not None:
            fill_row(row, answers, baseline, sweep.seed)
            result.answers[row.name] = answers
    if sweep.against is not None and recording is None:
        compare(result.rows, result.answers, sweep.against, sweep.seed, begin, ask)
    lm.detach()
    result.found = asker.found
    if sweep.rounds and recording is None and is_main():
        _time(result.rows, lm, first, sweep, progress)
    return result, first, lm


def _described(sweep: Sweep, facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what rows were made with, what their cells are found again by)."""
    run: dict[str, Any] = {"model": sweep.model, "seed": sweep.seed, "limit": sweep.limit}
    run |= {"batch_size": sweep.batch_size, "command": sweep.command, "commit": source_commit(), **facts}
    if len(sweep.seeds) > 1:
        run["seeds"] = list(sweep.seeds)
    # threads share out the work; they are no other question
    kinds = {name: facts[name] for name in ("device_kind", "dtype", "attention")}
    more = {"limit": sweep.limit, "batch_size": sweep.batch_size, "save_kept": sweep.save_kept, **kinds}
    return run, settings_of(sweep.model, facts["versions"], **more)


def _rows(sweep: Sweep, recording: Recording | None, run: dict[str, Any]) -> list[Row]:
    """The rows to fill, the unpruned model first."""
    rows = [Row(UNPRUNED_ROW, "1", 1.0, sweep.basis, run=run)]
    if recording is None:
        return rows + [Row(method, keep.text, keep.value, sweep.basis, run=run) for method, keep in sweep.cells()]
    for row in recording.rows:
        again = Row(f"{REPLAY}{row.method}", row.keep, row.keep_value, row.basis, kept_hash=row.kept_hash, run=run)
        rows.append(again)
    return rows


def load_chat(
    model: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    **options: Any,
) -> VtpruneChat:
    """A model that can be asked, nothing attached; the first arguments are those of `load_model`.

    Raises:
        InputError: if it cannot be loaded, or has no processor.
    """
    from vtprune.eval.asking import default_device
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.loading import load_model

    with quiet():
        loaded = load_model(
            model,
            device=device or default_device(),
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
        )
    if loaded[1] is None:
        raise InputError(f"the model {model!r} has no processor, so it cannot be asked questions. Use `vtprune bench`.")
    return VtpruneChat(loaded=loaded, **options)


def _time(rows: Sequence[Row], lm: VtpruneChat, harness: Harness, sweep: Sweep, progress: Progress) -> None:
    """Prefill medians of every cell that ran, on the first questions of the first task."""
    from vtprune.eval.asking import UNPRUNED, attach_to
    from vtprune.eval.prefill import prefill_timings

    cells = {
        row.name: functools.partial(attach_to, method=row.method, keep=row.keep_value, basis=row.basis)
        for row in rows
        if row.status == "ok" and row.method != UNPRUNED_ROW
    }
    inputs = lm.encode(harness.prompts(lm, next(iter(rows[0].tasks)), min(sweep.batch_size, _TIMED_BATCH)))
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
        "device_kind": f"{device.type} ({name})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }
