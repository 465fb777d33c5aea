"""`vtprune eval`: accuracy against token budget, from one command to a table, a plot and a page."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtprune.commands.options import require_matplotlib
from vtprune.errors import InputError
from vtprune.eval import BUNDLED_TASKS, TASKS_DIR
from vtprune.eval.keeps import parse_keeps
from vtprune.specs import split_methods, sweep_methods

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from vtprune.eval.runner import Sweep, SweepResult

__all__ = ["eval_command"]

_KEEPS = "1,1/2,1/4,1/9,1/16"
_FAST_KEEPS = "1,1/4,1/16"
_QUESTIONS = 150
_FAST_QUESTIONS = 40
_ROUNDS, _FAST_ROUNDS = 7, 3


def _print_tasks_dir(asked: bool) -> None:
    if asked:
        typer.echo(TASKS_DIR)
        raise typer.Exit


def eval_command(
    model: Annotated[
        str, typer.Option(help="Comma-separated: tiny:llava, tiny:qwen2_vl, tiny:internvl, hub ids or local folders.")
    ] = "tiny:llava",
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: names, with knobs gemfilter(layer=3), chains flowcut@1/2+fastv, 'all'."),
    ] = "all",
    keeps: Annotated[
        str | None, typer.Option(help=f"Budgets: shares such as 1/4 or 25%, or tokens such as 64. (default: {_KEEPS})")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated lmms-eval task names.")] = ",".join(BUNDLED_TASKS),
    limit: Annotated[
        int | None,
        typer.Option(help=f"Questions a task, 0 for all. (default: {_QUESTIONS}, {_FAST_QUESTIONS} if fast)"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a call.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/latest"),
    fast: Annotated[bool, typer.Option("--fast", help=f"A quick look: {_FAST_KEEPS}, fewer questions.")] = False,
    seed: Annotated[int, typer.Option(help="Of the bundled tasks' questions and of the bootstrap.")] = 0,
    basis: Annotated[str, typer.Option(help="What a budget counts: average (over layers) or final.")] = "average",
    against: Annotated[
        str, typer.Option(help="Compare every row with this method at equal FLOPs, or none.")
    ] = "random",
    device: Annotated[str | None, typer.Option(help="Where the model runs. (default: what is there)")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="Attention backend of transformers.")] = None,
    tasks_dir: Annotated[
        bool,
        typer.Option(
            "--tasks-dir",
            callback=_print_tasks_dir,
            is_eager=True,
            help="Print the folder to hand to lmms-eval's --include_path, and exit.",
        ),
    ] = False,
) -> None:
    """Accuracy against token budget on benchmark tasks: table, JSONL, plot and HTML page.

    Several models are measured one after another, each into a folder of its own below --out.

    In --keeps, 1 is all visual tokens (the unpruned model, always measured once); a single token is written 1t.

    In a chain such as flowcut@1/2+fastv the method without an @ takes the budgets of --keeps.
    """
    models = _names(model)
    if not models:
        raise InputError(f"name at least one model, got {model!r}.")
    first = _sweep(
        methods=methods,
        keeps=keeps or (_FAST_KEEPS if fast else _KEEPS),
        tasks=_names(tasks),
        model=models[0],
        limit=(_FAST_QUESTIONS if fast else _QUESTIONS) if limit is None else limit or None,
        batch_size=batch_size,
        seed=seed,
        basis=basis,
        against=None if against == "none" else against,
        rounds=_FAST_ROUNDS if fast else _ROUNDS,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    _check_models(models)
    console = _console()
    for keep in first.keeps:
        console.print(f"keep {keep}", style="dim", highlight=False)
    if not _run_all(first, models, out, console):
        raise typer.Exit(1)


def _console() -> Console:
    """The real stdout: the runner redirects it while lmms-eval is at work."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 120
    return console


def _run_all(sweep: Sweep, models: Sequence[str], out: Path, console: Console) -> bool:
    """The sweep on each model. True if no cell failed."""
    whole = True
    for name in models:
        start = time.perf_counter()
        if len(models) > 1:
            console.rule(name)
        folder = out / folder_name(name) if len(models) > 1 else out
        result, paths = _run(dataclasses.replace(sweep, model=name), folder, console)
        _show(result, paths, time.perf_counter() - start, console)
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
    from vtprune.eval.runner import Sweep

    read = tuple(parse_keeps(keeps))
    if settings["basis"] not in ("average", "final"):
        raise InputError(f"basis must be average or final, got {settings['basis']!r}.")
    require_matplotlib("vtprune eval")
    require_lmms_eval()
    command = "vtprune " + shlex.join(sys.argv[1:])
    return Sweep(methods=sweep_methods(methods), keeps=read, command=command, **settings)  # type: ignore[arg-type]


def _run(sweep: Sweep, out: Path, console: Console) -> tuple[SweepResult, dict[str, Path]]:
    """The sweep under a progress bar, then its files."""
    from vtprune.eval.examples import make_examples
    from vtprune.eval.kinds import deciding_rows, kinds_markdown, plot_kinds
    from vtprune.eval.plot import plot_rows
    from vtprune.eval.report_html import write_report
    from vtprune.eval.rows import write_rows
    from vtprune.eval.runner import run_sweep, write_predictions
    from vtprune.eval.table import markdown
    from vtprune.progress import RichProgress

    out.mkdir(parents=True, exist_ok=True)
    files = ("rows.jsonl", "predictions.jsonl", "table.md", "accuracy.png", "report.html")
    paths = {name: out / name for name in files}
    with RichProgress(console) as progress:
        result, harness, lm = run_sweep(sweep, progress)
        # figures first: they survive if a picture cannot be drawn
        write_rows(result.rows, paths["rows.jsonl"])
        write_predictions(result, paths["predictions.jsonl"])
        paths["table.md"].write_text(markdown(result.rows), encoding="utf-8")
        plot_rows(result.rows, paths["accuracy.png"])
        if deciding_rows(result.rows):
            paths |= {name: out / name for name in ("kinds.md", "kinds.png")}
            paths["kinds.md"].write_text(kinds_markdown(result.rows), encoding="utf-8")
            plot_kinds(result.rows, paths["kinds.png"])
        progress.start("drawing examples", 1)
        examples = make_examples(result, harness, lm)
        write_report(result.rows, paths["accuracy.png"], paths["report.html"], examples)
        progress.step("done")
    return result, paths


def _show(result: SweepResult, paths: dict[str, Path], seconds: float, console: Console) -> None:
    """The table, what failed, and where everything is."""
    from vtprune.eval.table import rich_table

    console.print(rich_table(result.rows, console.width))
    for row in result.rows:
        if row.status in ("not possible", "not trained"):
            console.print(f"{row.name}: {row.message}", style="yellow", highlight=False, markup=False)
    for name, message in result.failures.items():
        last = message.strip().splitlines()[-1]
        console.print(f"FAILED {name}: {last}", style="bold red", highlight=False, markup=False)
    for name, path in paths.items():
        console.print(f"{name:18s} {path}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s", style="dim", highlight=False)
