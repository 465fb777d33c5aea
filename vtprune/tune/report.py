"""What a search leaves behind: the plan, the front as JSON lines, Markdown and a picture, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vtprune.eval.stats import Interval
from vtprune.tune.choose import Compared, Point
from vtprune.tune.runner import Result

__all__ = ["comparison_markdown", "draw_front", "front_markdown", "show", "write"]

_COLOURS = {"trial": "#b5b5b5", "branch": "#b5b5b5", "single": "#0072B2", "tuned": "#D55E00"}
_NAMES = {"trial": "trials", "branch": None, "single": "single methods as they come", "tuned": "tuned plan"}


def write(result: Result, out: Path) -> dict[str, Path]:
    """All files, by name."""
    files = ("plan.json", "front.jsonl", "front.md", "front.png", *(("held_out.md",) * (result.held_out is not None)))
    paths = {name: out / name for name in files}
    made = {"search": result.settings.to_dict(), "found": result.chosen[0].found.text, **result.run}
    # `Plan.load` reads past what stands beside the stages
    plan = {**result.plan.to_dict(), "tuned": made}
    paths["plan.json"].write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps({**point.to_dict(), "run": result.run}) for point in result.points]
    paths["front.jsonl"].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    paths["front.md"].write_text(front_markdown(result), encoding="utf-8")
    draw_front(result.points, result.unpruned, paths["front.png"])
    if "held_out.md" in paths:
        paths["held_out.md"].write_text(comparison_markdown(result), encoding="utf-8")
    return paths


def percent(share: float, digits: int = 1) -> str:
    """0.2567 -> `25.7`."""
    return f"{100 * share:.{digits}f}"


def _difference(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """A table whose last `numbers` columns are numbers."""
    rule = "---|" * (len(titles) - numbers) + "---:|" * numbers
    lines = ["| " + " | ".join(titles) + " |", "|" + rule]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _front_rows(result: Result) -> list[list[str]]:
    shown = [point for point in result.points if point.on_front or point.role in ("single", "tuned")]
    return [
        [
            f"`{p.text}`",
            "" if p.role == "trial" else p.role,
            "yes" if p.on_front else "",
            percent(p.share),
            percent(p.accuracy),
        ]
        for p in shown
    ]


_FRONT = ("plan", "", "on the front", "FLOPs %", "accuracy %")


def front_markdown(result: Result) -> str:
    """The front and every single method, on the tuning questions."""
    asked = sum(trial.state == "asked" for trial in result.trials)
    stopped = sum(trial.state == "stopped" for trial in result.trials)
    impossible = len(result.trials) - asked - stopped
    settings = result.settings
    tasks = ", ".join(settings.tasks)
    note = (
        f"{settings.model}, {settings.goal}; {len(result.trials)} trials ({asked} asked everything, {stopped} stopped "
        f"early, {impossible} not possible); {settings.limit} questions a task ({tasks}), dev split, seed "
        f"{settings.seed}. Unpruned: {percent(result.unpruned)} %. FLOPs: share of the unpruned decoder prefill. These "
        "are the questions that the search was tuned on, which flatters the best of many trials."
    )
    return _markdown(_FRONT, _front_rows(result), 2) + f"\n{note}\n"


def _comparison_rows(rows: Sequence[Compared]) -> list[list[str]]:
    cells = []
    for row in rows:
        if row.share is None or row.accuracy is None or row.difference is None:
            cells.append([row.method, "-", "-", "-", row.verdict])
            continue
        figures = [percent(row.share), percent(row.accuracy.value), _difference(row.difference)]
        cells.append([row.method, *figures, row.verdict])
    return cells


_COMPARED = ("single method", "FLOPs %", "accuracy %", "tuned plan beyond it", "the tuned plan is")


def comparison_markdown(result: Result) -> str:
    """The tuned plan beside every single method on held-out questions; "" if there was no comparison."""
    if result.held_out is None:
        return ""
    return _markdown(_COMPARED, _comparison_rows(result.held_out[2]), 0) + f"\n{held_out_legend(result)}\n"


def held_out_legend(result: Result) -> str:
    """How the comparison was made, with the tuned plan's own figures."""
    if result.held_out is None:
        return ""
    mine, unpruned, _ = result.held_out
    own, images = mine.interval(result.settings.seed), len(set(mine.images))
    return (
        f"Tuned plan {result.chosen[0].found.text}: {percent(own.value)} % [{percent(own.low)}, {percent(own.high)}] "
        f"at {percent(mine.share)} % of the FLOPs; unpruned {percent(unpruned.accuracy)} %. {len(mine.scores)} "
        f"held-out questions on {images} images that the search has not seen. Each method as it comes got the smallest "
        "budget that costs no less than the tuned plan did on the tuning questions (one without a budget decides by "
        "itself). Points of accuracy with their paired 95 % interval, bootstrap over images; a tie is an interval that "
        "holds 0."
    )


def draw_front(points: Sequence[Point], unpruned: float, path: Path) -> None:
    """Accuracy against FLOPs on the tuning questions: trials grey, the front as steps, single methods by name."""
    # the object interface, not pyplot: no global state and no display is touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(100 * unpruned, color="#222222", linestyle="--", linewidth=1.2, label="unpruned", zorder=1)
    front = [(100 * p.share, 100 * p.accuracy) for p in points if p.on_front]
    axes.step(*zip(*front, strict=True), where="post", color="#009E73", linewidth=1.6, label="front", zorder=2)
    for role, colour in _COLOURS.items():
        mine = [p for p in points if p.role == role]
        x, y = [100 * p.share for p in mine], [100 * p.accuracy for p in mine]
        marker, size = ("*", 190) if role == "tuned" else ("o", 30)
        axes.scatter(x, y, s=size, color=colour, marker=marker, label=_NAMES[role], zorder=4 if role == "tuned" else 3)
        if role == "single":
            for point in mine:
                where = (100 * point.share, 100 * point.accuracy)
                axes.annotate(point.text, where, xytext=(5, -3), textcoords="offset points", fontsize=7, color=colour)
    axes.set_xlabel("decoder prefill FLOPs, % of unpruned")
    axes.set_ylabel("accuracy on the tuning questions, %")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _table(title: str, titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    for place, name in enumerate(titles):
        table.add_column(name, justify="right" if place in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell.strip("`") for cell in row))
    return table


def show(result: Result, paths: dict[str, Path], console: Console) -> None:
    """The front, the finalists, the comparison, and how to use the plan."""

    def say(text: str, **style: Any) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True, **style)

    console.print(_table("Accuracy against FLOPs, tuning questions", _FRONT, _front_rows(result), (3, 4)))
    for name, reason in result.skipped.items():
        say(f"{name} was left out: {reason}", style="yellow")
    say("finalists on the validation questions:")
    for chosen in result.chosen:
        say(f"  {percent(chosen.validation.accuracy):>5} %  {chosen.found.text}")
    best = result.chosen[0]
    if best.value < 0:
        say(f"No plan tried keeps the goal ({result.settings.goal}); this one comes nearest.", style="bold yellow")
    if result.settings.goal.kind == "latency":
        say("Prefill times were measured on this machine, interleaved, and repeat only roughly.", style="yellow")
    if result.held_out is not None:
        rows = _comparison_rows(result.held_out[2])
        console.print(_table("Held-out questions, equal FLOPs", _COMPARED, rows, (1, 2, 3)))
        say(held_out_legend(result))
    for name, path in paths.items():
        say(f"{name:14s} {path}")
    plan = paths["plan.json"]
    say(f'use            vtprune.prune(model, "{plan}")')
    say(f"               vtprune eval --model {result.settings.model} --methods {plan}")
