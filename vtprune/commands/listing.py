"""`vtprune methods` and `vtprune families`."""

from __future__ import annotations

from collections.abc import Mapping

import typer

__all__ = ["families_command", "methods_command"]


def _print_names(title: str, names: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(dict(names), indent=2))
        return
    from rich.table import Table
    from rich.text import Text

    from vtprune.commands.show import console

    table = Table(box=None, pad_edge=False)
    table.add_column(title, style="bold", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name, summary in names.items():
        table.add_row(Text(name), Text(summary))
    console().print(table)


def methods_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the pruning methods."""
    import vtprune

    _print_names("method", vtprune.methods(), as_json)


def families_command(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the model families that can be wrapped."""
    import vtprune

    _print_names("family", vtprune.families(), as_json)
