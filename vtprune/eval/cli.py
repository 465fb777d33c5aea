"""`vtprune eval`: accuracy against token budget, from one command to a table, a plot and a page."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vtprune.commands.options import read_numbers, require_matplotlib
from vtprune.errors import InputError
from vtprune.eval import options
from vtprune.eval.keeps import parse_keeps
from vtprune.eval.suites import expand_suites
from vtprune.processes import is_main
from vtprune.progress import real_console
from vtprune.specs import split_methods, sweep_methods

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vtprune.eval.sweep import Sweep, SweepResult

__all__ = ["eval_command"]


def eval_command(
    model: options.Models = "tiny:llava",
    methods: options.Methods = "all",
    keeps: options.Keeps = None,
    tasks: options.Tasks = "embedded",
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    out: options.Out = Path("runs/latest"),
    fast: options.Fast = False,
    rounds: options.Rounds = None,
    seeds: options.Seeds = "0",
    basis: options.Basis = "average",
    against: options.Against = "random",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
    save_kept: options.SaveKept = True,
    replay: options.Replay = None,
    fresh: options.Fresh = False,
    config: options.Config = None,
    flops_conventions: options.FlopsConventions = False,
    tasks_dir: options.TasksDir = False,
) -> None:
    """Accuracy against token budget on benchmark tasks: table, JSONL, plot and HTML page.

    Every answer is kept below --out, so a sweep that was interrupted goes on where it was when it is started again.
    Several processes share the questions: accelerate launch -m vtprune eval ...

    Several models are measured one after another, each into a folder of its own below --out.

    In --keeps, 1 is all visual tokens (the unpruned model, always measured once); a single token is written 1t.

    In a chain such as flowcut@1/2+fastv the method without an @ takes the budgets of --keeps.
    """
    models = _names(model)
    if not models:
        raise InputError(f"name at least one model, got {model!r}.")
    first = _sweep(
        methods=methods,
        keeps=keeps or (options.FAST_KEEPS if fast else options.KEEPS),
        tasks=expand_suites(_names(tasks)),
        model=models[0],
        limit=(options.FAST_QUESTIONS if fast else options.QUESTIONS) if limit is None else limit or None,
        batch_size=batch_size,
        seeds=tuple(read_numbers("--seeds", seeds, 0, "numbers from 0 on")),
        basis=basis,
        against=None if against == "none" else against,
        rounds=(options.FAST_ROUNDS if fast else options.ROUNDS) if rounds is None else rounds,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        save_kept=save_kept,
        replay=replay,
    )
    _check_models(models)
    console = real_console(quiet=not is_main())
    for keep in first.keeps:
        console.print(f"keep {keep}", style="dim", highlight=False)
    if not _run_all(first, models, out, console, fresh, flops_conventions):
        raise typer.Exit(1)


def _run_all(sweep: Sweep, models: Sequence[str], out: Path, console: Console, fresh: bool, conventions: bool) -> bool:
    """The sweep on each model. True if no cell failed."""
    whole = True
    for name in models:
        start = time.perf_counter()
        if len(models) > 1:
            console.rule(name)
        folder = out / folder_name(name) if len(models) > 1 else out
        result, paths = _run(dataclasses.replace(sweep, model=name), folder, console, fresh, conventions)
        _show(result, paths, time.perf_counter() - start, console, conventions)
        whole = whole and not result.failures
    return whole


def folder_name(model: str) -> str:
    """A model's folder below the results: `tiny:llava` -> `tiny-llava`, `org/model` -> `org--model`."""
    return model.strip("/").replace("/", "--").replace(":", "-")


def _check_models(models: Sequence[str]) -> None:
    """Read every config before the first of several models runs, so that a misspelt one does not cost the others."""
    from vtprune.loading import load_config

    if len(models) > 1:
        for name in models:
            load_config(name)


def _names(text: str) -> tuple[str, ...]:
    """`a, b,,a` -> (a, b)."""
    return tuple(dict.fromkeys(split_methods(text)))


def _sweep(*, methods: str, keeps: str, **settings: object) -> Sweep:
    """Validate what the user wrote, before anything heavy is loaded."""
    from vtprune.eval.harness import require_lmms_eval
    from vtprune.eval.interactive import require_plotly
    from vtprune.eval.sweep import Sweep

    read = tuple(parse_keeps(keeps))
    if settings["basis"] not in ("average", "final"):
        raise InputError(f"basis must be average or final, got {settings['basis']!r}.")
    require_matplotlib("vtprune eval")
    require_plotly()
    require_lmms_eval()
    command = "vtprune " + shlex.join(sys.argv[1:])
    return Sweep(methods=sweep_methods(methods), keeps=read, command=command, **settings)  # type: ignore[arg-type]


def _run(
    sweep: Sweep, out: Path, console: Console, fresh: bool, conventions: bool
) -> tuple[SweepResult, dict[str, Path]]:
    """The sweep under a progress bar, then its files."""
    from vtprune.eval.examples import make_examples
    from vtprune.eval.files import write_figures, write_page
    from vtprune.eval.records import write_predictions, write_records
    from vtprune.eval.runner import run_sweep
    from vtprune.eval.store import CellStore
    from vtprune.progress import RichProgress

    out.mkdir(parents=True, exist_ok=True)
    with RichProgress(console) as progress:
        result, harness, lm = run_sweep(sweep, progress, CellStore(out, fresh=fresh))
        if not is_main():
            return result, {}
        # figures first: they survive if a picture cannot be drawn
        paths, summary = write_figures(result, out, sweep.seed, conventions=conventions)
        paths |= {name: out / name for name in ("predictions.jsonl", "records.parquet")}
        write_predictions(result, paths["predictions.jsonl"])
        write_records(result, paths["records.parquet"])
        progress.start("drawing examples", 1)
        examples = make_examples(result, harness, lm)
        paths |= write_page(result.rows, summary, out, examples, conventions=conventions)
        progress.step("done")
    return result, paths


def _show(result: SweepResult, paths: dict[str, Path], seconds: float, console: Console, conventions: bool) -> None:
    """The table, what failed, and where everything is."""
    if result.found:
        console.print(f"{result.found} cells were there already (--fresh asks again)", style="dim", highlight=False)
    from vtprune.eval.table import rich_table

    console.print(rich_table(result.rows, console.width, conventions=conventions))
    for row in result.rows:
        if row.status in ("not possible", "not trained"):
            console.print(f"{row.name}: {row.message}", style="yellow", highlight=False, markup=False)
    for name, message in result.failures.items():
        last = message.strip().splitlines()[-1]
        console.print(f"FAILED {name}: {last}", style="bold red", highlight=False, markup=False)
    for name, path in paths.items():
        console.print(f"{name:18s} {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s", style="dim", highlight=False)
