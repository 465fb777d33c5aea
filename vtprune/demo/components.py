"""The fields of the page, and what shows the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo.handlers import NOTHING
from vtprune.demo.media import FILM_TYPES, PICTURE_TYPES
from vtprune.demo.models import Models
from vtprune.demo.settings import MAX_NEW_TOKENS, Settings
from vtprune.examples import examples

__all__ = ["Form", "Shown"]

_HERE = Path(__file__).parent


class Form:
    """The left side."""

    def __init__(self, models: Models, usual: Settings) -> None:
        import vtprune

        names = list(vtprune.methods())
        self._add_media()
        self._add_question(models, usual)
        self._add_method(names, usual)
        self._add_more(names)
        self.named = gr.State(usual.method)

    def _add_media(self) -> None:
        self.files = gr.Gallery(
            label="Pictures, or a short film",
            elem_id="vtp-files",
            type="filepath",
            interactive=True,
            sources=["upload", "webcam", "clipboard"],
            file_types=[*PICTURE_TYPES, *FILM_TYPES],
            columns=2,
            height=260,
            object_fit="contain",
            buttons=["fullscreen"],
        )
        self.examples = gr.Gallery(
            [(str(each.files[0]), each.title) for each in examples().values()],
            label="Examples",
            elem_id="vtp-examples",
            interactive=False,
            columns=4,
            allow_preview=False,
            object_fit="cover",
            buttons=[],
        )

    def _add_question(self, models: Models, usual: Settings) -> None:
        self.model = gr.Dropdown(list(models.specs), value=usual.model, label="Model", elem_id="vtp-model")
        self.question = gr.Textbox(
            usual.question, label="Question", elem_id="vtp-question", max_length=2000, lines=2, submit_btn=False
        )
        self.suggestions = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[question] for question, _ in examples()[usual.example].questions],
            label="Suggestions",
            elem_id="vtp-suggestions",
        )

    def _add_method(self, names: list[str], usual: Settings) -> None:
        self.method = gr.Dropdown(
            names,
            value=usual.method,
            label="Method",
            info="Also with knobs, gemfilter(layer=3), and with rules of choice and for the rest, flowcut/dpp/nearest.",
            elem_id="vtp-method",
            allow_custom_value=True,
            filterable=True,
        )
        self.keep = gr.Slider(
            1, 100, 25, step=1, label="Budget: visual tokens a layer, % of all", elem_id="vtp-keep", buttons=[]
        )
        self.decides = gr.Checkbox(False, label="Let the method decide", elem_id="vtp-decides", visible=False)
        self.preview = gr.HTML(elem_id="vtp-preview", min_height=24)
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="vtp-ask")
            self.stop = gr.Button("Stop", elem_id="vtp-stop")

    def _add_more(self, names: list[str]) -> None:
        others = [NOTHING, *names]
        with gr.Accordion("Compare and combine", open=False, elem_id="vtp-combine"):
            self.beside = gr.Dropdown(
                others, value=NOTHING, label="Compare with", elem_id="vtp-beside", allow_custom_value=True
            )
            self.first = gr.Dropdown(
                others, value=NOTHING, label="Cut before it with", elem_id="vtp-first", allow_custom_value=True
            )
            self.first_keep = gr.Slider(
                1, 100, 50, step=1, label="What that leaves, %", elem_id="vtp-first-keep", buttons=[]
            )
        with gr.Accordion("Knobs", open=False, elem_id="vtp-knobs"):
            self.basis = gr.Radio(
                [("average over the layers", "average"), ("what survives the last cut", "final")],
                value="average",
                label="The budget counts",
                elem_id="vtp-basis",
            )
            self.max_new_tokens = gr.Slider(
                1, MAX_NEW_TOKENS, 32, step=1, label="New tokens at most", elem_id="vtp-new-tokens", buttons=[]
            )
            self.knobs = gr.Column()

    @property
    def settings(self) -> list[Any]:
        """In the order in which `Handlers.settings` takes them, behind the files."""
        return [
            self.model,
            self.question,
            self.method,
            self.keep,
            self.decides,
            self.first,
            self.first_keep,
            self.beside,
            self.basis,
            self.max_new_tokens,
        ]


class Shown:
    """The right side."""

    def __init__(self) -> None:
        self.answers = gr.HTML(elem_id="vtp-answers", min_height=120)
        self.costs = gr.HTML(elem_id="vtp-costs")
        self.viewer = gr.HTML(
            {},
            html_template='<div class="vtp-viewer" hidden></div>',
            js_on_load=(_HERE / "viewer.js").read_text(encoding="utf-8"),
            elem_id="vtp-seen",
        )
        with gr.Accordion("Budget sweep", open=False, elem_id="vtp-sweep"):
            gr.HTML(
                "<p class='vtp-note'>How likely the model still gives its unpruned answer to this one question, as the "
                "budget shrinks.</p>"
            )
            self.sweep = gr.Button("Sweep the budget", elem_id="vtp-sweep-button")
            self.points = gr.LinePlot(
                x="budget",
                y="probability",
                color="method",
                x_title="visual tokens a layer, % of all",
                y_title="probability",
                y_lim=[0, 1],
                tooltip=["keep", "probability", "answer"],
                height=280,
                elem_id="vtp-points",
                buttons=[],
            )
            self.said = gr.HTML(elem_id="vtp-sweep-said")
        with gr.Accordion("Code, files and link", open=False, elem_id="vtp-code"):
            self.python = gr.Code(label="Python", language="python", interactive=False, elem_id="vtp-python")
            self.command = gr.Code(label="Command", language="shell", interactive=False, elem_id="vtp-command")
            with gr.Row():
                self.plan = gr.DownloadButton("plan.json", interactive=False, elem_id="vtp-plan")
                self.kept = gr.DownloadButton("kept.json", interactive=False, elem_id="vtp-kept")
            self.link = gr.Textbox(
                label="Link to these settings",
                elem_id="vtp-link",
                lines=2,
                interactive=True,
                info="The page's address is the same link. Uploaded files are not part of it.",
            )
            self.copy = gr.Button("Copy link", size="sm", elem_id="vtp-copy")
            self.query = gr.Textbox(visible="hidden", elem_id="vtp-query", label="query")
