"""`vtprune methods` and `vtprune families`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

import typer

__all__ = ["families_command", "methods_command"]


def _print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from vtprune.commands.show import console

    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0], style="bold", no_wrap=True)
    for title in columns[1:]:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def methods_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the pruning methods, and the rules that may stand behind one: fastv/dpp/nearest."""
    import vtprune
    from vtprune.rules import REMAINDERS, SELECTIONS

    methods = vtprune.methods()
    if as_json:
        typer.echo(json.dumps(methods, indent=2))
        return
    _print_rows(("method", "what it is"), methods.items())
    _print_rows(("/selection", "which tokens survive"), ((name, cls.summary) for name, cls in SELECTIONS.items()))
    _print_rows(("/remainder", "what happens to the rest"), ((name, cls.summary) for name, cls in REMAINDERS.items()))


def families_command(as_json: bool = typer.Option(False, "--json", help="Print JSON, outcomes of every test.")) -> None:
    """List the model families that can be wrapped, and how each was verified."""
    import vtprune

    families = vtprune.families()
    if as_json:
        typer.echo(json.dumps({name: dataclasses.asdict(info) for name, info in families.items()}, indent=2))
    else:
        rows = ((name, info.summary, info.verified) for name, info in families.items())
        _print_rows(("family", "what it is", "verified by"), rows)
