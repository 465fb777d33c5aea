"""Questions of visitors while they run: as they come onto the page, and given up when nobody wants them any more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from vtprune.demo.ask import race
from vtprune.demo.cards import answers_html, costs_html, error_html, points_html, waiting_html
from vtprune.demo.handlers import Files, Handlers
from vtprune.demo.result import Downloads, record_of
from vtprune.demo.stability import Point, stability
from vtprune.demo.survival import survival
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.demo.ask import Race
    from vtprune.demo.models import Loaded
    from vtprune.demo.settings import Settings
    from vtprune.prompt import Question

__all__ = ["Running", "Turns"]

_STOPPED = '<p class="vtp-verdict" role="status">Stopped.</p>'


@dataclass
class Turns:
    """Which question of one visitor counts: the last one that was asked, until it is stopped.

    (Gradio can cancel events by itself, but one that is cancelled while it answers may never be taken for finished.)
    """

    last: int = 0
    stopped: bool = False

    def take(self) -> int:
        """A ticket; those that were taken before no longer count."""
        self.last, self.stopped = self.last + 1, False
        return self.last

    def stop(self) -> None:
        """No ticket counts."""
        self.last, self.stopped = self.last + 1, True


class Running:
    """The functions that use a model, on the page of `handlers`."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._downloads = Downloads()

    def ask(self, turns: Turns, ticket: int, files: Files, *chosen: Any) -> Iterator[tuple[Any, ...]]:
        """Answers, costs, what was seen, and two downloads, as they come."""
        nothing = (gr.skip(),) * 3
        if turns.last != ticket:
            # without a word gradio would empty the page
            yield _STOPPED if turns.stopped else gr.skip(), gr.skip(), *nothing
            return
        loaded = self._handlers.models.is_loaded(chosen[0])
        yield waiting_html("Reading the question." if loaded else f"Loading {chosen[0]}."), "", {}, gr.skip(), gr.skip()
        try:
            settings, model, question = self._handlers.question(files, *chosen)
            last = None
            for state in race(model, question, settings.runs(), settings.max_new_tokens):
                if turns.last != ticket:
                    if turns.stopped:
                        yield stopped(answers_html(state)), gr.skip(), *nothing
                    return
                last = state
                yield answers_html(state), costs_html(state), *nothing
            if last is not None:
                yield answers_html(last), costs_html(last), *self._seen(model, question, last, settings)
        except VtpruneError as error:
            yield error_html(str(error)), "", {}, gr.skip(), gr.skip()

    def _seen(self, loaded: Loaded, question: Question, last: Race, settings: Settings) -> tuple[Any, ...]:
        from vtprune.prompt import pictures_seen

        seen = pictures_seen(loaded.processor, last.inputs, question.images)
        plan = last.pruned[0].plan
        plan_file = self._downloads.write("plan.json", plan and plan.to_dict())
        kept_file = self._downloads.write("kept.json", record_of(last, settings))
        return (
            survival(question, seen, last.pruned),
            gr.DownloadButton(value=plan_file, interactive=True),
            gr.DownloadButton(value=kept_file, interactive=True),
        )

    def sweep(self, turns: Turns, ticket: int, files: Files, *chosen: Any) -> Iterator[tuple[Any, Any]]:
        """Points for the plot, and the same as a table."""
        points: list[Point] = []
        if turns.last != ticket:
            yield gr.skip(), gr.skip()
            return
        try:
            settings, model, question = self._handlers.question(files, *chosen)
            for point in stability(model, question, settings.runs(), settings.max_new_tokens):
                if turns.last != ticket:
                    return
                points.append(point)
                yield _table(points), points_html(points)
        except VtpruneError as error:
            yield gr.skip(), error_html(str(error))

    def stop(self, turns: Turns, shown: str) -> str:
        """Gives up what runs and what waits; what is there of the answers stays."""
        turns.stop()
        return stopped(shown or "")


def stopped(shown: str) -> str:
    """Unfinished answers without their carets, and with a word about it; finished ones as they are."""
    if "vtp-caret" not in shown and "vtp-waiting" not in shown:
        return shown
    kept = re.sub(r'<span class="vtp-caret".*?</span>|<p class="vtp-waiting".*?</p>', "", shown)
    return kept + _STOPPED


def _table(points: Sequence[Point]) -> Any:
    """What the plot draws."""
    import pandas

    drawn = [
        (100 * point.share, point.probability, point.method, point.keep, "same" if point.same else "another")
        for point in points
        if point.share is not None
    ]
    return pandas.DataFrame(drawn, columns=["budget", "probability", "method", "keep", "answer"])
