"""The page: where its components stand, and which function follows which event."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
from gradio.events import api as add_endpoint

from vtprune.demo.api import Api
from vtprune.demo.components import Form, Shown
from vtprune.demo.handlers import Handlers
from vtprune.demo.knobs import fields_of
from vtprune.demo.models import Models
from vtprune.demo.running import Running, Turns
from vtprune.demo.settings import Settings
from vtprune.errors import VtpruneError
from vtprune.examples import examples

__all__ = ["build_app", "usual_settings"]

# one question at a time: two at once would slow each other and spoil the times of both
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_QUIET: dict[str, Any] = {**_PRIVATE, "show_progress": "hidden", "concurrency_limit": 8}
_AT_ONCE: dict[str, Any] = {**_QUIET, "queue": False, "trigger_mode": "multiple"}
_HEADER = (
    "<header><h1>vtprune</h1><p>Ask about a picture. The answer of the whole model stands beside that of the same "
    "model with most visual tokens dropped, with what it costs and what it saw.</p></header>"
)
_EMBEDDED_NOTE = (
    "<p class='vtp-note'>The embedded models know generated scenes and nothing else, and are so small that overhead "
    "hides much of the time that pruning saves; start the demo with <code>--model</code> to see a large one.</p>"
)
# the address bar is the link: it keeps the settings, and what is not one of them (such as the theme) stays
_LINK_JS = """
(query) => {
  const theme = new URLSearchParams(location.search).get("__theme");
  const parts = [query, theme ? "__theme=" + encodeURIComponent(theme) : ""].filter((part) => part);
  const address = location.pathname + (parts.length ? "?" + parts.join("&") : "");
  history.replaceState(null, "", address);
  return location.origin + location.pathname + (query ? "?" + query : "");
}
"""
_TO_ANSWERS_JS = """
() => { if (innerWidth < 768) document.getElementById("vtp-answers").scrollIntoView({ behavior: "smooth" }); }
"""


def usual_settings(models: Models) -> Settings:
    """What the page opens with: a question that FlowCut still answers at a quarter of the tokens."""
    shown = examples()["scene_1"]
    return Settings(models.specs[0], shown.name, shown.questions[1][0], "flowcut", "25%")


def build_app(models: Models) -> gr.Blocks:
    """The demo over these models; `vtprune.demo.launch` serves it."""
    usual = usual_settings(models)
    handlers = Handlers(models, usual)
    # what people upload is forgotten after an hour
    with gr.Blocks(title="vtprune demo", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.HTML(_HEADER, elem_id="vtp-header")
        with gr.Row(elem_id="vtp-columns"):
            with gr.Column(scale=2, min_width=320):
                form = Form(models, usual)
            with gr.Column(scale=3, min_width=320):
                shown = Shown()
        if all(spec.startswith("tiny:") for spec in models.specs):
            gr.HTML(_EMBEDDED_NOTE)
        # first, so that its functions get the names that they ask for
        _add_api(Api(models), models)
        _wire(app, handlers, form, shown)
    return app


def _wire(app: gr.Blocks, handlers: Handlers, form: Form, shown: Shown) -> None:
    running, asked = Running(handlers), [form.files, *form.settings]
    turns, ticket = gr.State(Turns()), gr.State(0)
    wanted = [form.ask.click, form.question.submit]
    # the ticket is taken at once, also where the question must wait for others
    gr.on(wanted, lambda mine: mine.take(), turns, ticket, **_AT_ONCE).then(
        running.ask,
        [turns, ticket, *asked],
        [shown.answers, shown.costs, shown.viewer, shown.plan, shown.kept],
        show_progress="minimal",
        show_progress_on=[shown.answers],
        # also while the former one still ends, which would otherwise swallow it
        trigger_mode="multiple",
        **_PRIVATE,
        **_ONE_AT_A_TIME,
    )
    # on a phone the answers stand below the form
    gr.on(wanted, None, js=_TO_ANSWERS_JS, **_PRIVATE)
    shown.sweep.click(lambda mine: mine.take(), turns, ticket, **_AT_ONCE).then(
        running.sweep,
        [turns, ticket, *asked],
        [shown.points, shown.said],
        show_progress="minimal",
        # also while the former one still ends, which would otherwise swallow it
        trigger_mode="multiple",
        **_PRIVATE,
        **_ONE_AT_A_TIME,
    )
    form.stop.click(running.stop, [turns, shown.answers], shown.answers, **_AT_ONCE)

    described = [form.preview, shown.python, shown.command, shown.query]
    changes = [component.change for component in (*form.settings, form.files)]
    gr.on(changes, handlers.describe, asked, described, trigger_mode="always_last", **_QUIET)
    shown.query.change(None, shown.query, shown.link, js=_LINK_JS, **_PRIVATE)

    shown.copy.click(None, shown.link, js="(link) => { navigator.clipboard.writeText(link); }", **_PRIVATE)
    form.suggestions.click(lambda sample: sample[0], form.suggestions, form.question, **_QUIET)
    form.examples.select(
        handlers.pick_example, form.model, [form.files, form.model, form.question, form.suggestions], **_QUIET
    )
    form.files.upload(handlers.suggest, form.files, form.suggestions, **_QUIET)
    form.method.change(handlers.method_name, form.method, [form.named, form.decides], **_QUIET)
    _render_knobs(app, handlers, form)
    app.load(handlers.restore, None, [form.files, form.suggestions, *form.settings], **_QUIET).then(
        handlers.describe, asked, described, **_QUIET
    )


def _render_knobs(app: gr.Blocks, handlers: Handlers, form: Form) -> None:
    """Fields of the chosen method, made anew when its name changes and not when a knob does."""
    with form.knobs:

        @gr.render(inputs=[form.method], triggers=[form.named.change, app.load], show_progress="hidden")
        def render(method: str) -> None:
            try:
                fields = fields_of(method)
            except VtpruneError:
                return
            for field in fields:
                place: dict[str, Any] = {"label": field.name, "info": field.about, "interactive": True}
                place["elem_id"] = f"vtp-knob-{field.name}"
                setter = partial(handlers.set_knob, knob=field.name)
                if field.choices:
                    box = gr.Dropdown(list(field.choices), value=field.value, **place)
                    box.input(lambda m, v, f=setter: f(m, value=v), [form.method, box], form.method, **_QUIET)
                else:
                    box = gr.Textbox(field.value, **place)
                    gr.on(
                        [box.submit, box.blur],
                        lambda m, v, f=setter: f(m, value=v),
                        [form.method, box],
                        form.method,
                        **_QUIET,
                    )


def _add_api(api: Api, models: Models) -> None:
    """Endpoints that are no part of the page; files go through a component, which checks that they were uploaded."""
    for simple in (api.models, api.methods, api.plan):
        add_endpoint(simple, api_name=simple.__name__)
    files = gr.File(file_count="multiple", visible=False, label="files")
    text = partial(gr.Textbox, visible=False)
    question = text(label="question")
    model = text(models.specs[0], label="model")
    method, keep = text("flowcut", label="method"), text("25%", label="keep")
    first, first_keep = text("", label="first"), text("50%", label="first_keep")
    beside, basis = text("", label="beside"), text("average", label="basis")
    length = gr.Number(32, visible=False, label="max_new_tokens")
    keeps = text("", label="keeps")
    out = gr.JSON(visible=False, label="result")
    hidden = gr.Button(visible=False)
    common: dict[str, Any] = {"api_visibility": "public", "show_progress": "hidden", **_ONE_AT_A_TIME}
    fields = [files, question, model, method, keep, first, first_keep, beside, basis, length]
    hidden.click(api.ask, fields, out, api_name="ask", **common)
    hidden.click(api.stability, [files, question, model, method, keeps, length], out, api_name="stability", **common)
