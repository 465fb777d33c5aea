"""The functions behind the demo's page, called as the page calls them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from vtprune.demo.app import build_app, usual_settings
from vtprune.demo.handlers import NOTHING, Handlers, example_of
from vtprune.demo.models import Models
from vtprune.demo.running import Running, Turns, stopped
from vtprune.demo.settings import Settings
from vtprune.examples import example, examples

QUESTION = "where is the digit 4?"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def handlers(models: Models) -> Handlers:
    return Handlers(models, usual_settings(models))


@pytest.fixture(scope="module")
def running(handlers: Handlers) -> Running:
    return Running(handlers)


def _files(name: str) -> list[tuple[str, None]]:
    return [(str(path), None) for path in example(name).files]


def _chosen(**changes: Any) -> list[Any]:
    fields = {
        "model": "tiny:llava",
        "question": QUESTION,
        "method": "flowcut",
        "keep": 25,
        "decides": False,
        "first": NOTHING,
        "first_keep": 50,
        "beside": NOTHING,
        "basis": "average",
        "max_new_tokens": 8,
    }
    assert set(changes) <= set(fields)
    return list({**fields, **changes}.values())


def _given(update: Any) -> dict[str, Any]:
    """What a component is updated with."""
    return update._constructor_args[0]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pops up on the page."""
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    return told


def test_a_question_goes_from_waiting_to_downloads(running: Running) -> None:
    turns = Turns()
    shown = list(running.ask(turns, turns.take(), _files("scene_1"), *_chosen()))
    first, last = shown[0], shown[-1]
    assert "Loading tiny:llava." in first[0] or "Reading the question." in first[0]
    assert first[2] == {}
    answers, costs, viewer, plan, kept = last
    assert answers.count("bottom left") == 2
    assert "taken in turn" in costs
    assert viewer["runs"][0]["total"] == 256
    for button, name in ((plan, "plan.json"), (kept, "kept.json")):
        assert Path(_given(button)["value"]).name == name
        assert _given(button)["interactive"]


def test_stopping_ends_it_with_what_is_there(running: Running) -> None:
    turns = Turns()
    asked = running.ask(turns, turns.take(), _files("scene_1"), *_chosen())
    next(asked)
    answers = next(asked)[0]
    assert "vtp-caret" in answers
    said = running.stop(turns, answers)
    assert "vtp-caret" not in said
    assert "Stopped." in said
    (last,) = asked
    assert "Stopped." in last[0]
    assert "vtp-caret" not in last[0]
    # one that still waited
    ticket = turns.take()
    turns.stop()
    (shown,) = running.ask(turns, ticket, _files("scene_1"), *_chosen())
    assert "Stopped." in shown[0]


def test_a_later_question_takes_the_place_of_the_former(running: Running) -> None:
    turns = Turns()
    ticket = turns.take()
    asked = running.ask(turns, ticket, _files("scene_1"), *_chosen())
    next(asked)
    next(asked)
    later = turns.take()
    assert list(asked) == []
    # one that still waited never starts
    (shown,) = running.ask(turns, ticket, _files("scene_1"), *_chosen())
    assert all(each == gr.skip() for each in shown)
    (shown,) = running.sweep(turns, ticket, _files("scene_1"), *_chosen())
    assert all(each == gr.skip() for each in shown)
    assert next(running.ask(turns, later, _files("scene_1"), *_chosen()))


def test_visitors_do_not_share_their_turns() -> None:
    one, other = Turns(), Turns()
    ticket = one.take()
    other.stop()
    assert one.last == ticket
    assert not one.stopped


def test_finished_answers_are_not_called_stopped() -> None:
    assert stopped("<p>an answer</p>") == "<p>an answer</p>"
    assert stopped("") == ""
    assert "Stopped." in stopped('<p class="vtp-waiting" role="status">Loading.</p>')
    assert "Loading" not in stopped('<p class="vtp-waiting" role="status">Loading.</p>')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fasttv"}, "Did you mean &#x27;fastv&#x27;"),
        ({"method": "fastv", "keep": 2}, "fastv cannot reach"),
        ({"model": "/etc"}, "Unknown model of this demo"),
        ({"question": ""}, "There is no question"),
        ({"max_new_tokens": 0}, "1 to 256 new tokens"),
        ({"method": "positions<b>"}, "positions&lt;b&gt;"),
    ],
)
def test_wrong_values_are_said_in_place_of_answers(running: Running, changes: dict[str, Any], message: str) -> None:
    turns = Turns()
    *_, last = running.ask(turns, turns.take(), _files("scene_1"), *_chosen(**changes))
    assert 'role="alert"' in last[0]
    assert message in last[0]
    assert last[2] == {}
    if "keep" not in changes:
        *_, swept = running.sweep(turns, turns.take(), _files("scene_1"), *_chosen(**changes))
        assert message in swept[1]


def test_a_sweep_grows_point_by_point(running: Running) -> None:
    turns = Turns()
    shown = list(running.sweep(turns, turns.take(), _files("scene_1"), *_chosen(beside="fastv")))
    assert [len(table) for table, _ in shown[:3]] == [1, 2, 3]
    table, html = shown[-1]
    assert set(table["method"]) == {"flowcut", "fastv"}
    assert table["probability"].between(0, 1).all()
    # what is out of reach is in the table for reading and not in the plot
    assert len(shown) == 20 > len(table)
    assert html.count('title="fastv cannot reach') == 20 - len(table)


def test_settings_are_read_from_the_fields(handlers: Handlers) -> None:
    chosen = _chosen(method="atp", decides=True, first="flowcut", first_keep=50, beside="uniform", keep=12.5)
    settings = handlers.settings(_files("scene_2"), *chosen)
    assert settings == Settings("tiny:llava", "scene_2", QUESTION, "atp", "", "flowcut", "50%", "uniform", "average", 8)
    # only a method that can decide is left to decide
    assert handlers.settings(None, *_chosen(decides=True)).keep == "25%"


def test_examples_are_known_by_their_bytes(tmp_path: Path) -> None:
    for each in examples().values():
        copies = [shutil.copy(file, tmp_path / file.name) for file in each.files]
        assert example_of([Path(copy) for copy in copies]) == each
    other = tmp_path / "scene_0.png"
    other.write_bytes(other.read_bytes() + b"\0")
    assert example_of([other]) is None
    assert example_of([]) is None


def test_settings_are_explained_and_written_as_code(handlers: Handlers) -> None:
    preview, python, command, query = handlers.describe(_files("scene_1"), *_chosen(beside="fastv"))
    assert "<b>flowcut</b>: 64 of 256 visual tokens a layer" in preview
    assert "<b>fastv</b>: 64.42 of 256" in preview
    assert "example('scene_1')" in python
    assert "--example scene_1" in command
    assert "beside=fastv" in query
    # an explained share is the share that a run has
    share = float(preview.partition("about ")[2].partition(" %")[0])
    assert abs(share - 22.6) < 1
    preview, *code = handlers.describe(_files("scene_1"), *_chosen(method="fastv", keep=2))
    assert "fastv cannot reach" in preview
    assert code == ["", "", ""]
    preview, *_ = handlers.describe(_files("scene_1"), *_chosen(model="tiny:qwen2_vl", keep=50))
    assert "about 50 % of the visual tokens a layer" in preview or "about 49" in preview
    preview, *_ = handlers.describe(_files("scene_1"), *_chosen(method="dyvte", decides=True))
    assert "at least" in preview


def test_an_example_brings_its_question_and_a_model_that_knows_it(handlers: Handlers) -> None:
    event = SimpleNamespace(index=list(examples()).index("words"))
    files, model, question, suggestions = handlers.pick_example("tiny:internvl", event)
    assert files == [str(file) for file in example("words").files]
    assert model == "tiny:qwen2_vl_plus"
    assert question == example("words").questions[0][0]
    assert [sample[0] for sample in _given(suggestions)["samples"]] == [text for text, _ in example("words").questions]
    assert handlers.show_example("tiny:internvl", "scene_0")[1] == "tiny:internvl"
    # a model of the visitor's own is left alone
    assert handlers.show_example("/my/model", "films")[1] == "/my/model"


def test_own_pictures_get_other_suggestions(handlers: Handlers, tmp_path: Path) -> None:
    own = shutil.copy(example("scene_0").files[0], tmp_path / "mine.png")
    assert _given(handlers.suggest([(str(own), None)]))["samples"][0] == ["Describe the picture."]
    assert _given(handlers.suggest(_files("scene_0")))["samples"][0] == [example("scene_0").questions[0][0]]


def test_a_method_s_name_and_whether_it_decides(handlers: Handlers) -> None:
    name, decides = handlers.method_name("gemfilter(layer=3)/dpp")
    assert (name, decides.visible) == ("gemfilter", False)
    name, decides = handlers.method_name("dyvte")
    assert (decides.visible, decides.value) == (True, True)
    name, decides = handlers.method_name("transprune")
    assert (decides.visible, decides.value) == (True, False)
    assert handlers.method_name("nothing(")[0] == "nothing("


def test_an_illegal_knob_pops_up_and_changes_nothing(handlers: Handlers, warnings: list[str]) -> None:
    assert handlers.set_knob("fastv", knob="layer", value="2") == "fastv(layer=2)"
    assert not warnings
    assert handlers.set_knob("fastv", knob="layer", value="deep") == gr.skip()
    assert "deep" in warnings[0]


def _request(**query: str) -> Any:
    return SimpleNamespace(query_params=query)


def test_a_link_fills_the_fields(handlers: Handlers, warnings: list[str]) -> None:
    files, suggestions, *fields = handlers.restore(
        _request(example="pairs", model="tiny:qwen2_vl_plus", method="fastv", keep="1/9", beside="pool", basis="final")
    )
    assert files == [str(file) for file in example("pairs").files]
    question = example("pairs").questions[0][0]
    assert _given(suggestions)["samples"][0] == [question]
    expected = ["tiny:qwen2_vl_plus", question, "fastv", 11.1, False, NOTHING, 50.0, "pool", "final", 32]
    assert fields == expected
    assert not warnings


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"method": "nothing"}, "Unknown method 'nothing'"),
        ({"model": "/etc"}, "does not offer the model '/etc'"),
        ({"keep": "64"}, "a link's budget is a share such as 25%, got '64'"),
        ({"example": "cat"}, "Unknown example 'cat'"),
        ({"method": "dyvte(weights='x')"}, "cannot be set here"),
    ],
)
def test_a_link_that_is_wrong_opens_the_usual_page(
    handlers: Handlers, warnings: list[str], query: dict[str, str], message: str
) -> None:
    _, _, *fields = handlers.restore(_request(**query))
    assert message in warnings[0]
    assert fields[:4] == ["tiny:llava", QUESTION, "flowcut", 25.0]


def test_the_page_is_built_for_the_models_it_is_given(models: Models) -> None:
    async def build() -> Any:
        return build_app(models)

    # gradio makes an event loop where none runs, and never closes it
    app = asyncio.run(build())
    config = app.get_config_file()
    labels = {component["props"].get("label") for component in config["components"]}
    assert {"Model", "Question", "Method", "Examples", "Suggestions"} <= labels
    public = {each["api_name"] for each in config["dependencies"] if each["api_visibility"] == "public"}
    assert public == {"ask", "methods", "models", "plan", "stability"}
    assert app.analytics_enabled is False
