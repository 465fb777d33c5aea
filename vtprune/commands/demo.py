"""`vtprune demo`: the browser page."""

from __future__ import annotations

import typer

import vtprune
from vtprune.demo.launch import launch
from vtprune.demo.models import EMBEDDED, Models
from vtprune.errors import InputError
from vtprune.loading import SPEC_HELP, load_config

__all__ = ["demo_command"]


def demo_command(
    model: list[str] | None = typer.Option(
        None, "--model", help=f"{SPEC_HELP}; may be repeated. All embedded models if there is none."
    ),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; 0.0.0.0 lets other machines in."),
    port: int = typer.Option(7860, "--port", min=1, max=65535, help="Port to listen on."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda, ..."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float32, bfloat16 or float16."),
    browser: bool = typer.Option(False, "--open", help="Open the page in a browser."),
) -> None:
    """Ask in a browser: the unpruned answer beside the pruned one, what it cost, and what it saw."""
    for spec in model or ():
        # a model that is not there, or cannot be pruned, is said before the page is
        vtprune.geometry(load_config(spec))
    models = Models(model or EMBEDDED, device, dtype)
    try:
        app = launch(models, host, port, browser=browser, ready=lambda at: typer.echo(f"vtprune demo at {at}"))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error} Choose another --port.") from error
    app.block_thread()
