"""`vtprune bench`: speed and memory of pruned against unpruned calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtprune.commands.options import read_numbers, require_matplotlib
from vtprune.errors import InputError
from vtprune.loading import SPEC_HELP
from vtprune.specs import sweep_methods

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.bench.runner import BenchConfig

__all__ = ["bench_command"]


def bench_command(
    model: str = typer.Option("random:llama-0.3b", "--model", help=SPEC_HELP),
    methods: str = typer.Option(
        "all", "--methods", help="Methods or chains (flowcut@1/2+fastv), comma-separated, or all."
    ),
    keeps: str = typer.Option("1/3,2/9,1/9", "--keeps", help="Budgets separated by commas; keep = 1 is always added."),
    batch_size: str = typer.Option("1", "--batch-size", help="One or several, separated by commas."),
    text_tokens: str = typer.Option("64", "--text-tokens", help="Text tokens a sample (random models): 64,512."),
    images: str = typer.Option("1", "--images", help="Images a sample (random models): 1,2,4."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ..."),
    dtype: str = typer.Option("float32", "--dtype", help="auto, float32, bfloat16 or float16."),
    attn: str | None = typer.Option(None, "--attn", help="Attention backend: sdpa, eager, flash_attention_2."),
    rounds: int = typer.Option(7, "--rounds", min=1, help="Timed calls of each cell; the median counts."),
    decode_steps: int = typer.Option(8, "--decode-steps", min=1, help="Tokens in one timed decode call."),
    threads: int | None = typer.Option(None, "--threads", min=1, help="CPU threads; torch's default if not set."),
    seed: int = typer.Option(0, "--seed"),
    out: Path | None = typer.Option(None, "--out", help="Write one JSON line a cell."),
    table: Path | None = typer.Option(None, "--table", help="Write the table as Markdown."),
    plot: Path | None = typer.Option(None, "--plot", help="Draw speed-up against budget, and cost against length."),
    against: str = typer.Option("", "--against", help="Time also, if installed: kvpress, sparsevlm, angelslim."),
    engine: str = typer.Option("hf", "--engine", help="hf; vllm, vllm-transformers: requests per second, first token."),
) -> None:
    """Time prefill and decoding, and count memory, for every method and budget.

    Every cell is first proved: keep = 1 is bit-identical, and a pruned call equals the unpruned one with the dropped
    tokens hidden. The prefill column is the decoder with everything that pruning adds around it; "with tower" is the
    whole call. A quotient of 1 means all the speed-up that the FLOP count allows; "bare" is the quotient of the same
    decoder, not pruned, on a prompt that is as short from the start: what this machine makes of fewer tokens.
    Of several batch sizes, text lengths and numbers of images all combinations are measured. With --against, other
    libraries run on the same prompts and budgets; theirs is not proved, and what cannot run is skipped with the reason.
    """
    import torch

    from vtprune.bench.runner import BenchConfig
    from vtprune.eval.keeps import parse_keeps
    from vtprune.loading import load_model

    if engine != "hf":
        _bench_engine(engine, model, methods, keeps, dtype, rounds, out)
        return
    if plot is not None:
        require_matplotlib("--plot")
    if threads is not None:
        torch.set_num_threads(threads)
    names = sweep_methods(methods)
    others = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    budgets = tuple(entry.value for entry in parse_keeps(keeps) if entry.value is not None)
    configs = [
        BenchConfig(names, budgets, batch, text, pictures, rounds, decode_steps, seed=seed, against=others)
        for pictures in dict.fromkeys(read_numbers("--images", images))
        for text in dict.fromkeys(read_numbers("--text-tokens", text_tokens))
        for batch in dict.fromkeys(read_numbers("--batch-size", batch_size))
    ]
    loaded, processor = load_model(model, device=device, dtype=dtype, attn_implementation=attn)
    if processor is not None and (len({c.text_tokens for c in configs}) > 1 or len({c.images for c in configs}) > 1):
        raise InputError(
            f"--text-tokens and --images make prompts for random models; {model} is asked its example question. Leave "
            "them out, or use a preset such as random:llama-0.3b."
        )
    prompts = [_inputs(loaded, processor, config) for config in configs]
    extra = {"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), "attention": attn or "default"}
    _measure_and_print(
        loaded, list(zip(configs, prompts, strict=True)), {**extra, "command": _command()}, out, table, plot
    )


def _command() -> str:
    # without the folder of the program: rows are shared between machines
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _bench_engine(engine: str, model: str, methods: str, keeps: str, dtype: str, rounds: int, out: Path | None) -> None:
    from vtprune.commands.bench_vllm import bench_vllm
    from vtprune.eval.keeps import parse_keeps

    backend = {"vllm": "native", "vllm-transformers": "transformers"}.get(engine)
    if backend is None:
        raise InputError(f"--engine must be hf, vllm or vllm-transformers, got {engine!r}.")
    names = sweep_methods(methods)
    if len(names) != 1:
        raise InputError(f"--engine {engine} measures one method, such as --methods visionzip, got {methods!r}.")
    budgets = tuple(entry.value for entry in parse_keeps(keeps) if entry.value is not None)
    bench_vllm(model, names[0], budgets, backend, dtype, rounds, out, _command())


def _inputs(model: Any, processor: Any, config: BenchConfig) -> dict[str, Any]:
    from vtprune.images import load_example
    from vtprune.presets import random_inputs
    from vtprune.prompt import Question, prompt_inputs

    if processor is None:
        return random_inputs(model, config.batch_size, config.text_tokens, config.images, config.seed)
    image, question = load_example()
    return prompt_inputs(model, processor, [Question(question, (image,))] * config.batch_size)


def _measure_and_print(
    model: Any,
    grid: list[tuple[BenchConfig, dict[str, Any]]],
    extra: dict[str, Any],
    out: Path | None,
    table: Path | None,
    plot: Path | None,
) -> None:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vtprune.bench.runner import run_bench
    from vtprune.bench.table import about, bench_markdown, break_even
    from vtprune.commands.show import console

    screen = console()
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("[progress.description]{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")
    for config, inputs in grid:
        first = len(rows)
        with Progress(*columns, console=screen, transient=True) as progress:
            task = progress.add_task("bench", total=None)

            def tell(method: str, task: Any = task, progress: Progress = progress) -> None:
                progress.update(task, description=method, advance=1)

            for row in run_bench(model, inputs, config, tell):
                rows.append({**row, **extra})
                if out is not None:  # at once: a long run that is stopped keeps what it has measured
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
        _print_table(screen, rows[first:])
    for line in break_even(rows):
        screen.print(line, markup=False, soft_wrap=True)
    if table is not None:
        table.parent.mkdir(parents=True, exist_ok=True)
        head = f"`{extra['command']}` ({about(rows[0])}):\n\n"
        table.write_text(head + bench_markdown(rows), encoding="utf-8")
    if plot is not None:
        from vtprune.bench.plot import plot_bench

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_bench(rows, plot)
    for path in (out, table, plot):
        if path is not None:
            screen.print(f"written to {path}", markup=False, soft_wrap=True)


def _print_table(screen: Console, rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from vtprune.bench.table import bench_table, keep_text, rival_lines

    screen.print(bench_table(rows))
    for line in rival_lines(rows):
        screen.print(Text(line, style="dim"), soft_wrap=True)
    for row in rows:
        for warning in row.get("warnings", []):
            where = f"{row['method']} at keep {keep_text(row['keep'])}"
            screen.print(Text(f"warning: {where}: {warning}", style="yellow"))
