"""The options of `vtprune eval`: types and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.eval import TASKS_DIR
from vtprune.eval.config import use_sweep_file
from vtprune.eval.suites import SUITES

KEEPS = "1,1/2,1/4,1/9,1/16"
FAST_KEEPS = "1,1/4,1/16"
QUESTIONS = 150
FAST_QUESTIONS = 40
ROUNDS, FAST_ROUNDS = 7, 3


def _print_tasks_dir(asked: bool) -> None:
    if asked:
        typer.echo(TASKS_DIR)
        raise typer.Exit


Models = Annotated[
    str,
    typer.Option(
        help="Comma-separated: tiny:llava, tiny:qwen2_vl, tiny:internvl, tiny:qwen2_vl_plus, hub ids, folders."
    ),
]

Methods = Annotated[
    str,
    typer.Option(help="Comma-separated: names, with knobs gemfilter(layer=3), chains flowcut@1/2+fastv, 'all'."),
]

Keeps = Annotated[
    str | None, typer.Option(help=f"Budgets: shares such as 1/4 or 25%, or tokens such as 64. (default: {KEEPS})")
]

Tasks = Annotated[
    str,
    typer.Option(help=f"Comma-separated lmms-eval task names, or suites of them: {', '.join(SUITES)}."),
]

Limit = Annotated[
    int | None,
    typer.Option(help=f"Questions a task, 0 for all. (default: {QUESTIONS}, {FAST_QUESTIONS} if fast)"),
]

BatchSize = Annotated[int, typer.Option(min=1, help="Questions a call.")]

Out = Annotated[Path, typer.Option(help="Folder for the results.")]

Fast = Annotated[bool, typer.Option("--fast", help=f"A quick look: {FAST_KEEPS}, fewer questions.")]

FlopsConventions = Annotated[
    bool, typer.Option("--flops-conventions", help="Tables also show FLOPs in the three units that papers use.")
]

Rounds = Annotated[
    int | None,
    typer.Option(help=f"Measurements of each prefill, 0 for no times. (default: {ROUNDS}, {FAST_ROUNDS} if fast)"),
]

Seeds = Annotated[
    str,
    typer.Option(help="Comma-separated, of bundled questions and methods that draw; rows have all their answers."),
]

Basis = Annotated[str, typer.Option(help="What a budget counts: average (over layers) or final.")]

Against = Annotated[str, typer.Option(help="Compare every row with this method at equal FLOPs, or none.")]

Device = Annotated[str | None, typer.Option(help="Where the model runs. (default: what is there)")]

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

AttnImplementation = Annotated[str | None, typer.Option(help="Attention backend of transformers.")]

DeviceMap = Annotated[
    str | None, typer.Option(help="Spread a checkpoint over devices: auto, balanced. (default: one device)")
]

SaveKept = Annotated[bool, typer.Option(help="Write down which tokens each stage kept of each question.")]

Replay = Annotated[
    Path | None, typer.Option(help="Keep the tokens that the sweep in this folder kept, in place of --methods.")
]

Fresh = Annotated[bool, typer.Option("--fresh", help="Ask again what --out has answers to.")]

Config = Annotated[
    Path | None,
    typer.Option(
        callback=use_sweep_file, is_eager=True, help="YAML file of these options; the command line goes before it."
    ),
]

TasksDir = Annotated[
    bool,
    typer.Option(
        "--tasks-dir",
        callback=_print_tasks_dir,
        is_eager=True,
        help="Print the folder to hand to lmms-eval's --include_path, and exit.",
    ),
]
