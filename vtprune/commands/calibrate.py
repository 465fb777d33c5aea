"""`vtprune calibrate`: find a method's setting for one model on a handful of samples."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtprune.commands.options import KEEP_HELP, read_numbers
from vtprune.errors import InputError, UnknownNameError
from vtprune.loading import SPEC_HELP

if TYPE_CHECKING:
    from vtprune.calibrate import LayerRow
    from vtprune.prompt import Question

__all__ = ["calibrate_command", "read_layers", "read_questions"]

_METHODS = ("gemfilter",)


def calibrate_command(
    method: str = typer.Argument(help="What to calibrate: gemfilter, whose filter layer differs between models."),
    model: str = typer.Option("tiny:llava", "--model", help=SPEC_HELP),
    data: Path | None = typer.Option(
        None, "--data", help='JSON lines {"image": path, "question": text}; the embedded models have questions already.'
    ),
    samples: int = typer.Option(16, "--samples", min=2, help="Questions asked; the first lines of --data."),
    keep: str = typer.Option("1/4", "--keep", help=KEEP_HELP + " Counted after the cut."),
    layers: str | None = typer.Option(
        None, "--layers", help="Layers to try, separated by commas. Default: from 0 to two thirds of the depth."
    ),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1, help="Longest answer."),
    seed: int = typer.Option(0, "--seed", min=0, help="Which questions the embedded models are asked."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ..."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float32, bfloat16 or float16."),
    out: Path | None = typer.Option(None, "--out", help="Write the result as JSON."),
) -> None:
    """Find the layer at which GemFilter keeps the model's own answers.

    Each layer is compared with the unpruned model: how likely its answers stay (mean log-probability of their tokens),
    and how many stay exactly the same. The first layer within one standard error of the best one is chosen.
    """
    if method not in _METHODS:
        raise UnknownNameError("method to calibrate", method, _METHODS)
    import vtprune
    from vtprune.budget import parse_keep
    from vtprune.calibrate import candidate_layers, choose_layer
    from vtprune.loading import load_config, load_model
    from vtprune.prompt import prompt_inputs

    budget = parse_keep(keep)
    questions = _questions(model, data, samples, seed)
    tried = candidate_layers(vtprune.geometry(load_config(model)).layers) if layers is None else read_layers(layers)
    loaded, processor = load_model(model, device=device, dtype=dtype)
    prompts = [prompt_inputs(loaded, processor, [question]) for question in questions]
    rows = _measure(loaded, prompts, budget, tried, max_new_tokens)
    layer = choose_layer(rows)
    _show(rows, layer, f"{model}, {len(prompts)} samples, keep {keep} after the cut", keep)
    if out is not None:
        settings = {
            "method": method,
            "model": model,
            "data": None if data is None else data.name,
            "samples": len(prompts),
            "keep": budget,
            "basis": "final",
            "max_new_tokens": max_new_tokens,
            "seed": None if data is not None else seed,
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        _write(out, settings, rows, layer, loaded)


def read_layers(text: str) -> list[int]:
    """`1,2,3` -> [1, 2, 3].

    Raises:
        InputError: if a part is not a layer.
    """
    return read_numbers("--layers", text, 0, "layers from 0 on")


def read_questions(path: Path, samples: int) -> list[Question]:
    """The first `samples` questions of a file of JSON lines; images are looked up beside the file.

    Raises:
        InputError: if the file or an image is missing, a line is malformed, or there are fewer than 2 questions.
    """
    from vtprune.images import open_image
    from vtprune.jsonl import read_data_lines
    from vtprune.prompt import Question

    questions: list[Question] = []
    for line in itertools.islice(read_data_lines(path), samples):
        try:
            questions.append(Question(line.question, tuple(open_image(image) for image in line.images)))
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from error
    if len(questions) < 2:
        raise InputError(f"{str(path)!r} holds {len(questions)} question(s); calibration needs at least 2.")
    return questions


def _questions(model: str, data: Path | None, samples: int, seed: int) -> list[Question]:
    from vtprune.prompt import Question

    if model.startswith("random:"):
        raise InputError(f"{model!r} has random weights and cannot answer, so there is nothing to calibrate.")
    if data is not None:
        return read_questions(data, samples)
    if not model.startswith("tiny:"):
        raise InputError(f'--model {model!r} needs --data FILE with lines {{"image": path, "question": text}}.')
    from vtprune.tiny.scenes import scene_questions

    # the dev split: what is calibrated here may be measured on the test split
    pictures = scene_questions("dev", samples, seed, per_image=1)
    return [Question(asked[0].question, (image,)) for image, asked in pictures if asked]


def _measure(
    model: Any, prompts: list[dict[str, Any]], keep: int | float, layers: list[int], max_new_tokens: int
) -> list[LayerRow]:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vtprune.calibrate import calibrate_gemfilter
    from vtprune.commands.show import console

    columns = (TextColumn("[progress.description]{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task("answers", total=len(prompts) * (1 + len(set(layers))))
        return calibrate_gemfilter(
            model, prompts, keep, layers, max_new_tokens=max_new_tokens, tell=lambda: progress.advance(task)
        )


def _show(rows: list[LayerRow], layer: int, title: str, keep: str) -> None:
    from rich.table import Table

    from vtprune.commands.show import console, share_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "log-probability", "same answers", "prefill FLOPs"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            str(row.layer),
            f"{row.log_prob:.4f}",
            f"{sum(row.same)} of {len(row.same)}",
            share_text(row.flops, row.flops_full),
            "chosen" if row.layer == layer else "",
            style="green" if row.layer == layer else None,
        )
    screen = console()
    screen.print(title, markup=False)
    screen.print(table)
    screen.print("log-probability: of a token of the unpruned model's answer, in the pruned model; 0 is certain")
    use = f'vtprune.prune(model, vtprune.GemFilter(layer={layer}), keep="{keep}", basis="final")'
    screen.print(f"use  {use}", markup=False, soft_wrap=True)


def _write(out: Path, settings: dict[str, Any], rows: list[LayerRow], layer: int, model: Any) -> None:
    from vtprune.bench.provenance import provenance
    from vtprune.commands.show import console

    lines = [
        {
            "layer": row.layer,
            "log_prob": row.log_prob,
            "log_probs": row.log_probs,
            "same": row.same,
            "same_share": row.same_share,
            "flops": row.flops,
            "flops_full": row.flops_full,
        }
        for row in rows
    ]
    result = {**settings, "layer": layer, "layers": lines, **provenance(model.device)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console().print(f"written to {out}", markup=False, soft_wrap=True)
