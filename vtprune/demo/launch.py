"""Serving the page, on this machine and for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

# before gradio is imported: it reads them then
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from gradio.themes import Base
from starlette.middleware import Middleware

from vtprune.demo.app import build_app
from vtprune.demo.guard import Guard
from vtprune.demo.media import MAX_FILM_BYTES
from vtprune.demo.models import Models
from vtprune.examples import FOLDER

__all__ = ["launch", "theme"]

_WAITING = 32


def theme() -> gr.Theme:
    """Colours of the page; its fonts are those of the reader's system, so that none is fetched."""
    fonts = ["system-ui", "sans-serif"]
    return Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]).set(
        block_label_text_weight="500", block_title_text_weight="500"
    )


def launch(
    models: Models,
    host: str = "127.0.0.1",
    port: int | None = None,
    *,
    ready: Callable[[str], object] | None = None,
    browser: bool = False,
) -> gr.Blocks:
    """Serve the demo; its threads go on until the returned app is closed, or blocked on.

    Args:
        models: what it offers.
        host: address to listen on; others than this machine can only come in if it is not the usual one.
        port: to listen on, a free one from 7860 on if None.
        ready: called with the address once it is served.
        browser: open one.

    Raises:
        OSError: if the port cannot be listened on.
    """
    # the page can be looked at while the first model loads
    threading.Thread(target=lambda: models[models.specs[0]], daemon=True).start()
    app = build_app(models)
    app.queue(max_size=_WAITING, default_concurrency_limit=4)
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        inbrowser=browser,
        quiet=True,
        share=False,
        theme=theme(),
        css=(Path(__file__).parent / "demo.css").read_text(encoding="utf-8"),
        allowed_paths=[str(FOLDER)],
        max_file_size=MAX_FILM_BYTES,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    if ready is not None:
        ready(address)
    return app
