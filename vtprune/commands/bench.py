"""`vtprune bench`: speed and memory of pruned against unpruned calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtprune.commands.options import read_methods
from vtprune.loading import SPEC_HELP

if TYPE_CHECKING:
    from vtprune.bench.runner import BenchConfig

__all__ = ["bench_command"]


def bench_command(
    model: str = typer.Option("random:llama-0.3b", "--model", help=SPEC_HELP),
    methods: str = typer.Option("all", "--methods", help="Methods separated by commas, or all."),
    keeps: str = typer.Option("1/3,2/9,1/9", "--keeps", help="Budgets separated by commas; keep = 1 is always added."),
    batch_size: int = typer.Option(1, "--batch-size", min=1),
    text_tokens: int = typer.Option(64, "--text-tokens", min=2, help="Text tokens a sample (random models)."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ..."),
    dtype: str = typer.Option("float32", "--dtype", help="auto, float32, bfloat16 or float16."),
    attn: str | None = typer.Option(None, "--attn", help="Attention backend: sdpa, eager, flash_attention_2."),
    rounds: int = typer.Option(7, "--rounds", min=1, help="Timed calls of each cell; the median counts."),
    decode_steps: int = typer.Option(8, "--decode-steps", min=1, help="Tokens in one timed decode call."),
    threads: int | None = typer.Option(None, "--threads", min=1, help="CPU threads; torch's default if not set."),
    seed: int = typer.Option(0, "--seed"),
    out: Path | None = typer.Option(None, "--out", help="Write one JSON line a cell."),
) -> None:
    """Time prefill and decoding, and count memory, for every method and budget.

    The prefill column is the decoder with everything that pruning adds around it; "with tower" is the whole call.
    A quotient of 1 means all the speed-up that the FLOP count allows; "bare" is the quotient of the same decoder, not
    pruned, on a prompt that is as short from the start: what this machine makes of fewer tokens.
    """
    import torch

    import vtprune
    from vtprune.bench.runner import BenchConfig
    from vtprune.eval.keeps import parse_keeps
    from vtprune.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    names = tuple(vtprune.methods()) if methods.strip() == "all" else tuple(read_methods(methods))
    config = BenchConfig(
        names,
        tuple(entry.value for entry in parse_keeps(keeps)),
        batch_size=batch_size,
        text_tokens=text_tokens,
        rounds=rounds,
        decode_steps=decode_steps,
        seed=seed,
    )
    loaded, processor = load_model(model, device=device, dtype=dtype, attn_implementation=attn)
    inputs = _inputs(loaded, processor, config)
    extra = {"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), "attention": attn or "default"}
    # without the folder of the program: rows are shared between machines
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    _measure_and_print(loaded, inputs, config, {**extra, "command": command}, out)


def _inputs(model: Any, processor: Any, config: BenchConfig) -> dict[str, Any]:
    from vtprune.commands.prompt import Question, prompt_inputs
    from vtprune.images import load_example
    from vtprune.presets import random_inputs

    if processor is None:
        return random_inputs(model, config.batch_size, config.text_tokens, seed=config.seed)
    image, question = load_example()
    return prompt_inputs(model, processor, [Question(question, (image,))] * config.batch_size)


def _measure_and_print(
    model: Any, inputs: dict[str, Any], config: BenchConfig, extra: dict[str, Any], out: Path | None
) -> None:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from vtprune.bench.runner import run_bench
    from vtprune.bench.table import bench_table, keep_text
    from vtprune.commands.show import console

    screen = console()
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("[progress.description]{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("bench", total=None)

        def tell(method: str) -> None:
            progress.update(task, description=method, advance=1)

        for row in run_bench(model, inputs, config, tell):
            rows.append({**row, **extra})
            if out is not None:  # at once: a long run that is stopped keeps what it has measured
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    screen.print(bench_table(rows))
    for row in rows:
        for warning in row.get("warnings", []):
            where = f"{row['method']} at keep {keep_text(row['keep'])}"
            screen.print(Text(f"warning: {where}: {warning}", style="yellow"))
    if out is not None:
        screen.print(f"rows written to {out}", markup=False, soft_wrap=True)
