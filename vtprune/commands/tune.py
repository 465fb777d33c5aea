"""`vtprune tune`: search for the plan that keeps the most under a limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtprune.commands.options import read_methods, read_numbers, require_matplotlib
from vtprune.errors import InputError
from vtprune.loading import SPEC_HELP
from vtprune.specs import split_methods, sweep_methods

if TYPE_CHECKING:
    from vtprune.tune.runner import Settings

__all__ = ["tune_command"]

_TASKS = "vtp_scenes,vtp_easy_vqa"


def tune_command(
    model: Annotated[str, typer.Option(help=SPEC_HELP)] = "tiny:llava",
    flops: Annotated[
        float | None, typer.Option(help="Most accuracy with at most this share of the unpruned prefill FLOPs.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Most accuracy with at most this share of the unpruned prefill time, measured here."),
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Fewest FLOPs with at least this share of the unpruned accuracy.")
    ] = None,
    trials: Annotated[int, typer.Option(min=0, help="Trials, beside one of every single method as it comes.")] = 60,
    methods: Annotated[str, typer.Option(help="Comma-separated names of methods to combine, or all.")] = "all",
    tasks: Annotated[str, typer.Option(help="Comma-separated lmms-eval task names.")] = _TASKS,
    limit: Annotated[
        int, typer.Option(help="Questions a task to tune on, a multiple of 4; as many others to validate on.")
    ] = 120,
    held_out: Annotated[
        int, typer.Option(min=0, help="Questions a task and seed to compare with single methods on, 0 for none.")
    ] = 250,
    held_out_seeds: Annotated[str, typer.Option(help="Of the test questions of that comparison.")] = "1,2",
    out: Annotated[Path, typer.Option(help="Folder of the search; one that was interrupted goes on.")] = Path(
        "runs/tune"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the search and of its questions.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a call.")] = 16,
    device: Annotated[str | None, typer.Option(help="Where the model runs. (default: what is there)")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="Attention backend of transformers.")] = None,
) -> None:
    """Search methods, their knobs, chains of two and budgets for the plan that keeps the most under a limit.

    Exactly one of --flops, --latency and --accuracy is the limit. The search asks questions of the dev split; a few
    finalists are judged on others; the winner is compared with every single method at equal FLOPs on the test split.

    The same command goes on where a search was interrupted, or with more --trials where it ended.
    """
    from vtprune.tune.goal import Goal
    from vtprune.tune.runner import Settings

    goal = Goal.read(flops, latency, accuracy)
    names = sweep_methods(methods)
    if strange := [name for name in read_methods(",".join(names)) if "(" in name]:
        raise InputError(f"--methods takes names, whose knobs are searched, got {strange[0]!r}.")
    settings = Settings(
        model=model,
        goal=goal,
        methods=names,
        tasks=tuple(dict.fromkeys(split_methods(tasks))),
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    _run(settings, out, trials, held_out, read_numbers("--held-out-seeds", held_out_seeds, 0, "numbers from 0 on"))


def _run(settings: Settings, out: Path, trials: int, held_out: int, seeds: list[int]) -> None:
    """Check what must be installed, search under progress bars, then the files."""
    from vtprune.eval.harness import require_lmms_eval
    from vtprune.progress import RichProgress, real_console
    from vtprune.tune.report import show, write
    from vtprune.tune.runner import run_tune
    from vtprune.tune.search import require_optuna

    require_optuna()
    require_matplotlib("vtprune tune")
    require_lmms_eval()
    console = real_console()
    with RichProgress(console) as progress:
        result = run_tune(settings, out, trials, held_out, seeds, progress)
    show(result, write(result, out), console)
