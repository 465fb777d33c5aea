"""What the fields of the page mean and do to each other; asking is in `vtprune.demo.running`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vtprune.budget import parse_keep
from vtprune.cost import plan_cost
from vtprune.demo.cards import error_html
from vtprune.demo.code import command_line, python_lines
from vtprune.demo.knobs import with_knob
from vtprune.demo.media import read_question
from vtprune.demo.models import Models
from vtprune.demo.settings import Settings, without_rules
from vtprune.errors import InputError, VtpruneError
from vtprune.examples import Example, example, examples
from vtprune.specs import parse_knobs, parse_method

if TYPE_CHECKING:
    from vtprune.demo.models import Loaded
    from vtprune.prompt import Question

__all__ = ["NOTHING", "Files", "Handlers", "example_of"]

NOTHING = "nothing"
Files = list[tuple[str, str | None]] | None
_OWN_PICTURES = ("Describe the picture.", "What is in the foreground?", "What does the text say?")


def paths_of(files: Files) -> list[Path]:
    """The files of a gallery."""
    return [Path(path) for path, _ in files or ()]


def example_of(paths: Sequence[Path]) -> Example | None:
    """The example whose files these are, byte for byte."""
    for each in examples().values():
        if [path.name for path in paths] == [file.name for file in each.files] and all(
            path.read_bytes() == file.read_bytes() for path, file in zip(paths, each.files, strict=True)
        ):
            return each
    return None


class Handlers:
    """The page's functions over the models it offers.

    Args:
        models: what can be asked.
        usual: the settings that the page opens with.
    """

    def __init__(self, models: Models, usual: Settings) -> None:
        self.models, self.usual = models, usual

    def question(self, files: Files, *chosen: Any) -> tuple[Settings, Loaded, Question]:
        """All that is wrong is found here, before a model runs."""
        paths = paths_of(files)
        settings = self.settings(files, *chosen)
        settings.runs()
        loaded = self.models[settings.model]
        return settings, loaded, read_question(loaded.model, loaded.reads_videos, settings.question, paths)

    def settings(
        self,
        files: Files,
        model: str,
        question: str,
        method: str,
        keep: float,
        decides: bool,
        first: str,
        first_keep: float,
        beside: str,
        basis: str,
        max_new_tokens: float,
    ) -> Settings:
        """What the page's fields say; the order is that of the fields."""
        shown = example_of(paths_of(files))
        return Settings(
            model=model,
            example="" if shown is None else shown.name,
            question=question,
            method=method,
            keep="" if decides and parse_method(method).adaptive else f"{keep:g}%",
            first="" if first == NOTHING else first,
            first_keep=f"{first_keep:g}%",
            beside="" if beside == NOTHING else beside,
            basis=basis,
            max_new_tokens=int(max_new_tokens),
        )

    # what follows from the settings

    def describe(self, files: Files, *chosen: Any) -> tuple[str, str, str, str]:
        """What the budget means on this model, and the settings as Python, as a command and as a query."""
        try:
            settings = self.settings(files, *chosen)
            run, *_ = settings.runs()
            loaded = self.models[settings.model]
            names = [path.name for path in paths_of(files)]
            code = python_lines(settings, run, names), command_line(settings, run, names), settings.query()
            return self._preview(loaded, settings), *code
        except VtpruneError as error:
            return error_html(str(error)), "", "", ""

    def _preview(self, loaded: Loaded, settings: Settings) -> str:
        from vtprune.prompt import Question, chat_text

        prompt = chat_text(loaded.processor, Question(settings.question))
        text = len(getattr(loaded.processor, "tokenizer", loaded.processor)(prompt)["input_ids"])
        lines = []
        for run in settings.runs():
            session = run.attach(loaded.copy())
            geometry = session.geometry.for_prompt(session.geometry.visual_tokens, text, 1)
            plan = session.plan_for(geometry.visual_tokens, text, 1)
            average, share = plan_cost(plan, geometry, "average"), plan_cost(plan, geometry, "flops")
            least = "at least " if any(stage.adaptive for stage in plan.stages) else ""
            tokens = f"{average:.4g} of {geometry.visual_tokens} visual tokens a layer"
            if geometry.dynamic:
                # how many there are depends on the picture
                tokens = f"about {100 * average / geometry.visual_tokens:.3g} % of the visual tokens a layer"
            cost = f"about {100 * share:.3g} % of the decoder's prefill"
            lines.append(f"<b>{escape(run.method)}</b>: {least}{tokens}, {cost}")
        return f'<p class="vtp-preview">{"<br>".join(lines)}</p>'

    def pick_example(self, model: str, event: gr.SelectData) -> tuple[Any, ...]:
        """Pictures, model, question and suggestions of the example that was clicked."""
        return self.show_example(model, list(examples().values())[int(event.index)].name)

    def show_example(self, model: str, name: str) -> tuple[Any, ...]:
        """The same of one that is named; the model changes if it was not made for it and another one was."""
        shown = example(name)
        suited = [spec for spec in self.models.specs if spec.removeprefix("tiny:") in shown.models]
        embedded = model.startswith("tiny:")
        model = model if not suited or not embedded or model in suited else suited[0]
        questions = [[question] for question, _ in shown.questions]
        return [str(file) for file in shown.files], model, questions[0][0], gr.Dataset(samples=questions)

    def suggest(self, files: Files) -> Any:
        """Questions that fit the pictures."""
        shown = example_of(paths_of(files))
        questions = _OWN_PICTURES if shown is None else [question for question, _ in shown.questions]
        return gr.Dataset(samples=[[question] for question in questions])

    def method_name(self, method: str) -> tuple[str, Any]:
        """Its name without knobs, and whether it can decide by itself."""
        try:
            chosen = parse_method(method)
            named, _ = parse_knobs(without_rules(method))
        except VtpruneError:
            return method, gr.skip()
        return named, gr.Checkbox(visible=chosen.adaptive, value=not chosen.takes_budget)

    def set_knob(self, method: str, knob: str, value: Any) -> Any:
        """The method's text with a knob set; an illegal value leaves it and says why."""
        try:
            return with_knob(method, knob, str(value))
        except VtpruneError as error:
            gr.Warning(str(error))
            return gr.skip()

    def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """Pictures, suggestions and fields as the link's query has them."""
        try:
            query = dict(request.query_params)
            usual = dataclasses.replace(self.usual, question="") if "example" in query else self.usual
            settings = Settings.from_query(query, usual)
            settings.runs()
            if settings.model not in self.models.specs:
                raise InputError(f"this demo does not offer the model {settings.model!r} of the link.")
            return self._fields(settings)
        except VtpruneError as error:
            gr.Warning(f"The link was not understood: {error}")
            return self._fields(self.usual)

    def _fields(self, settings: Settings) -> tuple[Any, ...]:
        name = settings.example or self.usual.example
        files, _, question, suggestions = self.show_example(settings.model, name)
        return (
            files,
            suggestions,
            settings.model,
            settings.question or question,
            settings.method,
            _percent(settings.keep or self.usual.keep),
            not settings.keep,
            settings.first or NOTHING,
            _percent(settings.first_keep),
            settings.beside or NOTHING,
            settings.basis,
            settings.max_new_tokens,
        )


def _percent(keep: str) -> float:
    value = parse_keep(keep)
    if isinstance(value, int):
        raise InputError(f"a link's budget is a share such as 25%, got {keep!r}.")
    return max(1.0, round(100 * value, 1))
