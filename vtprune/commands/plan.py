"""`vtprune plan`: solve a budget on a model's config and show what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vtprune.commands.options import KEEP_HELP, METHOD_HELP, pair_keeps, read_methods
from vtprune.errors import BudgetError
from vtprune.loading import SPEC_HELP
from vtprune.specs import parse_method

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.budget import Geometry
    from vtprune.plan import Plan

__all__ = ["plan_command", "solve_stages"]


def solve_stages(
    methods: list[str], keeps: list[int | float] | None, geometry: Geometry, *, basis: str, flops: float | None
) -> tuple[Plan, list[str]]:
    """The plan of several methods in order, each on what the earlier ones leave.

    Returns:
        the plan, and for each method how its budget was read.

    Raises:
        BudgetError: if a budget is malformed or out of reach.
        PlanError: if the methods cannot follow each other in this order.
    """
    from vtprune.budget import Budget
    from vtprune.contract import compose

    if flops is not None and len(methods) > 1:
        raise BudgetError(f"--flops fits one method, got {len(methods)} ({','.join(methods)}). Use --keep a,b instead.")
    budgets = [Budget.make(k, basis=basis, flops=flops) for k in keeps or [None] * len(methods)]
    plan = compose([parse_method(name) for name in methods], budgets, geometry)
    return plan, [f"{name}: {budget}" for name, budget in zip(methods, budgets, strict=True)]


def plan_command(
    model: str = typer.Option("tiny:llava", "--model", help=SPEC_HELP),
    method: str = typer.Option("fastv", "--method", help=METHOD_HELP),
    keep: str | None = typer.Option(None, "--keep", help=KEEP_HELP),
    basis: str = typer.Option("average", "--basis", help="average over the decoder layers, or final."),
    flops: float | None = typer.Option(None, "--flops", help="Share of the unpruned prefill FLOPs, instead of --keep."),
    images: int = typer.Option(1, "--images", min=1, help="Images in the prompt."),
    text_tokens: int = typer.Option(64, "--text-tokens", min=1, help="Tokens of the prompt that are not visual."),
    save: Path | None = typer.Option(None, "--save", help="Write the plan as JSON."),
) -> None:
    """Print the solved plan and its cost. Only the model's config is read."""
    import vtprune
    from vtprune.commands.show import console
    from vtprune.loading import load_config

    methods = read_methods(method)
    keeps = pair_keeps(methods, keep)
    geometry = vtprune.geometry(load_config(model))
    geometry = geometry.for_prompt(geometry.visual_tokens * images, text_tokens, images)
    plan, read = solve_stages(methods, keeps, geometry, basis=basis, flops=flops)
    screen = console()
    screen.print(
        f"{model}: {geometry.family}, {geometry.layers} layers x {geometry.hidden}, "
        f"{geometry.visual_tokens} visual and {text_tokens} text tokens",
        markup=False,
    )
    for line in (*(f"keep read as  {line}" for line in read), *(f"note  {note}" for note in geometry.notes)):
        screen.print(line, markup=False)
    show_plan(plan, geometry, screen)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        plan.save(save)
        screen.print(f"written to {save}", markup=False, soft_wrap=True)


def show_plan(plan: Plan, geometry: Geometry, screen: Console) -> None:
    """Print stages, tokens per layer and cost."""
    from rich.table import Table
    from rich.text import Text

    from vtprune.commands.show import flop_text, layers_text, share_text
    from vtprune.cost import kv_bytes, plan_cost, prefill_flops

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("site", "method", "keeps", "positions"):
        table.add_column(name)
    total = geometry.visual_tokens
    for stage in plan.stages:
        least = "at least " if stage.adaptive else ""
        keeps = f"{least}{stage.count(total)} of {total}"
        table.add_row(Text(str(stage.site)), Text(stage.scorer.name), keeps, stage.positions)
    screen.print(table if plan.stages else "no stages: every token stays")

    tokens = plan.tokens_per_layer(geometry.entering, total)
    lengths = [geometry.text_tokens + t for t in tokens]
    full = [geometry.text_tokens + total] * geometry.layers
    # the passes that restarts break off and the layers that are asked ahead are part of the cost
    average, share = plan_cost(plan, geometry, "average"), plan_cost(plan, geometry, "flops")
    flops_full = prefill_flops(geometry, full)
    screen.print(f"visual tokens      {layers_text(tokens)}")
    screen.print(f"average a layer    {average:.2f} of {total}")
    kv, kv_full = kv_bytes(geometry, lengths, 1), kv_bytes(geometry, full, 1)
    flops = f"{flop_text(share * flops_full)} of {flop_text(flops_full)} ({share_text(share, 1)})"
    screen.print(f"decoder prefill    {flops}, text included")
    screen.print(f"KV cache           {share_text(kv, kv_full)}, text included")
    if plan.at("vision"):
        screen.print(
            "The tower's savings are not in these figures; `vtprune run` and `vtprune bench` report them apart."
        )
    if any(stage.adaptive for stage in plan.stages):
        screen.print("An adaptive stage may keep more than shown; the report of a run says how many.")
