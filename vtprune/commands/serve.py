"""`vtprune serve`: vLLM's OpenAI-compatible server with the plugin."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import typer

from vtprune.commands.vllm_start import checked_overrides, served_place
from vtprune.errors import InputError
from vtprune.integrations.vllm.settings import Settings

__all__ = ["serve_command", "server_flags"]


def serve_command(
    model: str = typer.Argument(..., help="A Hugging Face id or folder, or tiny:llava (embedded)."),
    extra: list[str] | None = typer.Argument(None, help="More of vLLM's own flags, behind a --."),
    method: str = typer.Option("visionzip", "--method", help="How tokens are chosen (docs/serving.md has the list)."),
    keep: str = typer.Option("25%", "--keep", help="Of each image, unless a request says otherwise: 64, 25%, 1/4."),
    name: str | None = typer.Option(None, "--name", help="What clients call the model; as it was given if not set."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on."),
    port: int = typer.Option(8000, "--port", min=1, max=65535, help="Port to listen on."),
    images: int = typer.Option(4, "--images", min=1, help="Most images in a request."),
    dtype: str = typer.Option("auto", "--dtype", help="auto, float32, bfloat16 or float16."),
    backend: str = typer.Option("native", "--backend", help="Whose decoder: native (vLLM's own) or transformers."),
) -> None:
    """Serve a model over HTTP; each request may set its own budget."""
    settings = Settings.read({"method": method, "keep": keep})
    overrides = checked_overrides("vtprune serve", model, settings, backend)
    with served_place(model) as place:
        flags = server_flags(place, overrides, name or model, host, port, images, dtype)
        raise typer.Exit(_run([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, *(extra or ())]))


def server_flags(
    place: str, overrides: Mapping[str, Any], name: str, host: str, port: int, images: int, dtype: str
) -> list[str]:
    """The flags of vLLM's server.

    Args:
        place: folder or hub id of the model.
        overrides: of the model's config, see `Settings.overrides`.
        name: of the model, for clients.
        host, port: where to listen.
        images: most images in a request.
        dtype: of the weights.

    Raises:
        InputError: if vLLM knows no such dtype.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    flags = {
        "--model": place,
        "--served-model-name": name,
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--limit-mm-per-prompt": json.dumps({"image": images}),
        "--hf-overrides": json.dumps(overrides),
    }
    # budgets and questions of requests come in mm_processor_kwargs
    return [*(part for pair in flags.items() for part in pair), "--trust-request-mm-kwargs"]


def _run(command: list[str]) -> int:
    """Run the server until it ends, or until this process is told to."""
    server = subprocess.Popen(command)
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, lambda number, _: server.send_signal(number))
    return server.wait()
