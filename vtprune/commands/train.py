"""`vtprune train`: the predictor of a learned method, for one model, on questions with answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtprune.errors import InputError
from vtprune.loading import SPEC_HELP
from vtprune.train.data import DATA_HELP

if TYPE_CHECKING:
    from vtprune.train.loop import LoopResult

__all__ = ["train_command"]


def train_command(
    method: str = typer.Argument(
        help="What to train: dyvte, atp or relevance, with settings of its trainer if need be, such as "
        "'dyvte(width=64)' or 'atp(target=0.15)'."
    ),
    model: str = typer.Option("tiny:llava", "--model", help=SPEC_HELP),
    data: str = typer.Option("embedded", "--data", help=DATA_HELP),
    held_out: Path | None = typer.Option(
        None, "--held-out", help="File of JSON lines to stop by, for data from a file; else a tenth is held out."
    ),
    out: Path = typer.Option(..., "--out", help="Folder of the weights; a run that was interrupted goes on."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="Training questions at most."),
    held_out_samples: int | None = typer.Option(None, "--held-out-samples", min=1, help="Held-out questions at most."),
    epochs: int | None = typer.Option(None, "--epochs", min=1, help="Passes over the data; the method's if not set."),
    batch_size: int | None = typer.Option(None, "--batch-size", min=1, help="Samples a step, over all processes."),
    lr: float | None = typer.Option(None, "--lr", help="Largest learning rate; the method's if not set."),
    patience: int | None = typer.Option(None, "--patience", min=1, help="Epochs without progress before it stops."),
    save_every: int | None = typer.Option(None, "--save-every", min=1, help="Steps between two stored states."),
    seed: int = typer.Option(0, "--seed", min=0),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ...; of each process, if there are several."),
    dtype: str = typer.Option("auto", "--dtype", help="Of the model: auto, float32, bfloat16 or float16."),
    weights: str = typer.Option("float32", "--weights", help="How the predictor is stored: float32 or float16."),
) -> None:
    """Train a predictor; the model itself stays as it is.

    Start it again with the same settings and it goes on where it was interrupted. Several processes, on one machine or
    more: `accelerate launch -m vtprune train ...`; the result does not depend on their number. The log is
    OUT/run/log.csv, the weights of the best epoch are OUT/config.json and OUT/model.safetensors.
    """
    if weights not in ("float32", "float16"):
        raise InputError(f"--weights must be float32 or float16, got {weights!r}.")
    import torch

    from vtprune.loading import load_model
    from vtprune.processes import new_accelerator
    from vtprune.progress import RichProgress
    from vtprune.train.data import read_data
    from vtprune.train.methods import read_trainer

    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "patience": patience, "save_every": save_every}
    loop = {name: value for name, value in given.items() if value is not None}
    name, trainer, config = read_trainer(method, {**loop, "seed": seed})
    train = read_data(data, "train", samples, seed, held_out=held_out)
    other = read_data(data, "held-out", held_out_samples, seed, held_out=held_out)
    process = new_accelerator("train")
    where = device or (str(process.device) if process.device.type == "cuda" else None)
    loaded, processor = load_model(model, device=where, dtype=dtype)
    if processor is None:
        raise InputError(f"the model {model!r} has no processor, so it cannot be asked questions.")
    console = _console()
    if process.is_main_process:
        console.print(f"{name} for {model}: {len(train)} questions, {len(other)} held out", highlight=False)
    with RichProgress(console) as progress:
        shown = progress if process.is_main_process else None
        result = trainer.train(loaded, processor, train, other, out, config, shown, getattr(torch, weights))
    if process.is_main_process:
        _show(name, result, out, console)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout)


def _show(name: str, result: LoopResult, out: Path, console: Any) -> None:
    """Held-out figures before and after, and what to do next."""
    from rich.table import Table

    first, best = result.history[0], result.history[result.best_epoch]
    table = Table("held out", "untrained", f"epoch {result.best_epoch}", box=None)
    for figure in (key for key in first if key.startswith("held_out_")):
        table.add_row(figure.removeprefix("held_out_"), f"{first[figure]:.4g}", f"{best[figure]:.4g}")
    console.print(table)
    if result.best_epoch == 0:
        console.print("Training never made it better; try another --lr or more data.", style="yellow")
    use = f"\"{name}(weights='{out}')\""
    console.print(f"weights  {out}\nuse      vtprune run --method {use}", highlight=False, soft_wrap=True, markup=False)
