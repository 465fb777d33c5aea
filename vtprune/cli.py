"""The `vtprune` command. Commands live in `vtprune/commands`; heavy imports happen inside them."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from vtprune import __version__
from vtprune.commands import bench, calibrate, listing, plan, run
from vtprune.errors import VtpruneError

__all__ = ["app", "main"]

# name -> (module, function, help); imported when called, so that a missing extra stops that command only
_LAZY = {
    "demo": ("vtprune.commands.demo", "demo_command", "Ask in a browser, unpruned beside pruned."),
    "eval": ("vtprune.eval.cli", "eval_command", "Accuracy against token budget on benchmark tasks."),
    "serve": ("vtprune.commands.serve", "serve_command", "An OpenAI-compatible server that prunes, on vLLM."),
    "train": ("vtprune.commands.train", "train_command", "Train the predictor of a learned method."),
    "tune": ("vtprune.commands.tune", "tune_command", "Search for the plan that keeps the most under a limit."),
}


class _Group(TyperGroup):
    """Shows vtprune's own errors without a traceback, and imports lazy commands when they are called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _LAZY:
            command = _load_lazy(name)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VtpruneError as error:
            _show_error(error)
            raise typer.Exit(2) from error


def _show_error(error: VtpruneError) -> None:
    from rich.console import Console
    from rich.text import Text

    # Text, not markup: messages contain square brackets such as layer[2]
    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error), style="red"))


def _load_lazy(name: str) -> Any:
    module_name, function, _ = _LAZY[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or "a module"
        hint = "" if missing.startswith("vtprune") else f" Install it with: pip install 'vtprune[{name}]'."
        raise VtpruneError(f"`vtprune {name}` needs {missing!r}, which is not installed.{hint}") from error
    holder = typer.Typer(add_completion=False)
    holder.command(name)(getattr(module, function))
    return typer.main.get_command(holder)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune visual tokens of Hugging Face vision-language models, and see accuracy against cost.",
)
app.command("methods")(listing.methods_command)
app.command("families")(listing.families_command)
app.command("plan")(plan.plan_command)
app.command("run")(run.run_command)
app.command("bench")(bench.bench_command)
app.command("calibrate")(calibrate.calibrate_command)


def _stub() -> None:
    """Stands in listings for a command that is imported when it is called."""


for _name, (_, _, _help) in _LAZY.items():
    app.command(_name, help=_help)(_stub)


def _print_version(asked: bool) -> None:
    if not asked:
        return
    typer.echo(f"vtprune {__version__}")
    raise typer.Exit


@app.callback()
def _root(
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the console script."""
    app()
