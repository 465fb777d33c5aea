"""`vtprune run`: one question about images and videos, the unpruned answer beside the pruned one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtprune.commands.options import KEEP_HELP, METHOD_HELP, pair_keeps, read_methods
from vtprune.errors import InputError
from vtprune.loading import SPEC_HELP
from vtprune.specs import load_plan, parse_chain, split_methods

if TYPE_CHECKING:
    from vtprune.plan import Plan
    from vtprune.prompt import Question
    from vtprune.report import Report

__all__ = ["run_command"]

_ROUNDS = 5  # timed prefills of each side


def run_command(
    image: list[Path] | None = typer.Option(
        None, "--image", help="Image file; may be repeated. An example that ships with vtprune if there is none."
    ),
    example: str | None = typer.Option(None, "--example", help="Ask about an example that ships, such as scene_1."),
    video: list[Path] | None = typer.Option(None, "--video", help="Video file; may be repeated."),
    question: str | None = typer.Option(None, "--question", help="Question about them."),
    method: str | None = typer.Option(None, "--method", help=METHOD_HELP + " Or a chain: flowcut@1/2+fastv."),
    keep: str | None = typer.Option(None, "--keep", help=KEEP_HELP + " Default: 25%."),
    basis: str = typer.Option("average", "--basis", help="average over the decoder layers, or final."),
    model: str = typer.Option("tiny:llava", "--model", help=SPEC_HELP),
    plan: Path | None = typer.Option(None, "--plan", help="Plan file, instead of --method and --keep."),
    max_new_tokens: int = typer.Option(32, "--max-new-tokens", min=1),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ..."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Answer one question with all visual tokens and with a part of them, and compare."""
    from vtprune.commands.show import console
    from vtprune.loading import load_model
    from vtprune.prompt import prompt_inputs

    what, keeps = _what(method, keep, plan)
    images, videos, question = _files(image or [], video or [], example, question)
    given = [("image", path) for path in images] + [("video", path) for path in videos]
    for kind, path in given:
        if question is None:
            raise InputError(f"--{kind} {str(path)!r} needs a --question about it.")
        if not path.is_file():
            raise InputError(f"there is no {kind} file {str(path)!r}.")
    loaded, processor = load_model(model, device=device, dtype=dtype)
    if processor is None:
        raise InputError(f"{model!r} has random weights and cannot answer. Use `vtprune bench` for it.")
    asked = _question(loaded, images, videos, question)
    inputs = prompt_inputs(loaded, processor, [asked])

    full, pruned, report, seconds = _answers(loaded, inputs, what, keeps, basis, max_new_tokens)
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (full, pruned)]
    screen = console()
    for kind, path in given or [("image", "an example that ships with vtprune")]:
        screen.print(f"{kind:9} {path}", markup=False)
    screen.print(f"question  {asked.text}", markup=False)
    _show(screen, texts, _agreement(full, pruned), report, seconds, _label(what, keeps))


def _files(
    images: list[Path], videos: list[Path], example: str | None, question: str | None
) -> tuple[list[Path], list[Path], str | None]:
    """Pictures, films and the question, those of an example if one is named."""
    from vtprune.examples import example as example_of

    if example is None:
        return images, videos, question
    if images or videos:
        raise InputError(f"--example {example!r} brings its own pictures; leave out --image and --video.")
    shown = example_of(example)
    return list(shown.images), list(shown.videos), question or shown.questions[0][0]


def _question(model: Any, images: list[Path], videos: list[Path], text: str | None) -> Question:
    from vtprune.images import load_example, open_image
    from vtprune.prompt import Question, read_video

    if images or videos:
        films = tuple(read_video(model, path) for path in videos)
        return Question(text or "", tuple(open_image(path) for path in images), films)
    picture, example = load_example()
    return Question(text or example, (picture,))


def _what(method: str | None, keep: str | None, plan: Path | None) -> tuple[Plan | list[str], list[int | float] | None]:
    if plan is None:
        names = split_methods(method or "fastv")
        if len(names) != 1:
            names = read_methods(method or "")
        # one chain may hold budgets of its own, or decide by itself
        elif keep is None and parse_chain(names[0]).decides:
            return names, None
        return names, pair_keeps(names, keep or ",".join(["25%"] * len(names)))
    if method is not None or keep is not None:
        raise InputError(f"--plan {str(plan)!r} already says what to keep; leave out --method and --keep.")
    return load_plan(plan), None


def _label(what: Plan | list[str], keeps: list[int | float] | None) -> str:
    if isinstance(what, list):
        budgets = [""] * len(what) if keeps is None else [f" {keep:.4g}" for keep in keeps]
        return " + ".join(f"{name}{budget}" for name, budget in zip(what, budgets, strict=True))
    return "plan: " + ", ".join(f"{stage.scorer.name} at {stage.site}" for stage in what.stages)


def _answers(
    model: Any,
    inputs: dict[str, Any],
    what: Plan | list[str],
    keeps: list[int | float] | None,
    basis: str,
    max_new_tokens: int,
) -> tuple[list[int], list[int], Report, dict[str, float]]:
    """New token ids unpruned and pruned, the report, and median prefill seconds of each, tower included."""
    import torch

    import vtprune
    from vtprune.bench.measure import shared_copy
    from vtprune.bench.timing import interleaved_medians

    wrapped = shared_copy(model)
    keep: Any = keeps if keeps is None or len(keeps) > 1 else keeps[0]
    names = what[0] if isinstance(what, list) and len(what) == 1 else what
    session = vtprune.prune(wrapped, names, keep=keep, basis=basis)
    prompt = inputs["input_ids"].shape[1]

    def answer(one: Any) -> list[int]:
        with torch.no_grad():
            out = one.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, prompt:].tolist()

    def prefill(one: Any) -> Any:
        with torch.no_grad():
            return one(**inputs, use_cache=True, logits_to_keep=1)

    full, pruned = answer(model), answer(wrapped)
    report = session.report
    timings = interleaved_medians(
        {"full": lambda: prefill(model), "pruned": lambda: prefill(wrapped)}, rounds=_ROUNDS, warmup=0
    )
    return full, pruned, report, {name: timing.median_s for name, timing in timings.items()}


def _agreement(full: list[int], pruned: list[int]) -> int | None:
    """How many leading tokens agree; None if all do."""
    if full == pruned:
        return None
    for at, (a, b) in enumerate(zip(full, pruned, strict=False)):
        if a != b:
            return at
    return min(len(full), len(pruned))


def _show(
    screen: Any, texts: list[str], differs_at: int | None, report: Report, seconds: dict[str, float], label: str
) -> None:
    from rich.table import Table
    from rich.text import Text

    from vtprune.commands.show import byte_text, flop_text, layers_text, share_text

    style = "green" if differs_at is None else "yellow"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "unpruned", label, "share"):
        table.add_column(Text(name), overflow="fold")
    mark = "same answer" if differs_at is None else f"differs from token {differs_at + 1}"
    table.add_row("answer", Text(texts[0]), Text(texts[1], style=style), Text(mark, style=style))
    total, average = report.visual_tokens[0], report.average_tokens[0]
    table.add_row("visual tokens a layer", str(total), f"{average:.1f}", share_text(average, total))
    for name, part, whole in (
        ("decoder prefill", report.flops, report.flops_full),
        ("vision tower", report.vision_flops, report.vision_flops_full),
    ):
        table.add_row(name, flop_text(whole), flop_text(part), share_text(part, whole))
    kv, kv_full = report.kv_bytes, report.kv_bytes_full
    table.add_row("KV cache", byte_text(kv_full), byte_text(kv), share_text(kv, kv_full))
    table.add_row(
        f"prefill, median of {_ROUNDS}",
        f"{seconds['full'] * 1e3:.3g} ms",
        f"{seconds['pruned'] * 1e3:.3g} ms",
        share_text(seconds["pruned"], seconds["full"]),
    )
    screen.print(table)
    screen.print(f"visual tokens  {layers_text(report.tokens_per_layer[0])}")
    for kept in report.kept:
        screen.print(f"kept at {kept.site}: {len(kept.indices[0])} of {total}", markup=False)
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)
