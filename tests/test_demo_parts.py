"""What the demo is made of, without a browser: files, settings, answers, pictures, code."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune import cli
from vtprune.errors import BudgetError, InputError, PlanError, UnknownNameError
from vtprune.examples import example, examples

pytest.importorskip("gradio", reason="the demo's page is made with it")

from vtprune.demo.ask import Answer, Race, agreement, race
from vtprune.demo.cards import answers_html, costs_html, error_html, points_html
from vtprune.demo.code import command_line, python_lines
from vtprune.demo.guard import Guard, addresses_in
from vtprune.demo.knobs import fields_of, with_knob
from vtprune.demo.media import read_question
from vtprune.demo.models import Loaded, Models
from vtprune.demo.result import Downloads, record_of, result_of
from vtprune.demo.settings import Run, Settings, public_knobs, read_method
from vtprune.demo.stability import stability
from vtprune.demo.stream import TokenStream
from vtprune.demo.survival import survival, survival_of
from vtprune.prompt import Question, pictures_seen, prompt_inputs
from vtprune.tiny.shipped import write_film

QUESTION = "where is the digit 4?"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def llava(models: Models) -> Loaded:
    return models["tiny:llava"]


@pytest.fixture
def question(llava: Loaded) -> Question:
    return read_question(llava.model, False, QUESTION, example("scene_1").files)


def _last(loaded: Loaded, question: Question, *runs: Run, patience_s: float = 0) -> Race:
    *_, last = race(loaded, question, runs, 8, patience_s=patience_s)
    return last


# files


def _saved(path: Path, size: tuple[int, int] = (40, 30), **options: Any) -> Path:
    Image.new("RGB", size, "teal").save(path, **options)
    return path


def test_pictures_of_every_legal_kind_are_read(llava: Loaded, tmp_path: Path) -> None:
    files = [_saved(tmp_path / name) for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.gif")]
    question = read_question(llava.model, False, " what? ", files)
    assert question.text == "what?"
    assert [image.size for image in question.images] == [(40, 30)] * 5
    assert {image.mode for image in question.images} == {"RGB"}


def test_a_photograph_is_turned_as_its_camera_says(llava: Loaded, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    question = read_question(llava.model, False, "what?", [_saved(tmp_path / "a.jpg", exif=exif)])
    assert question.images[0].size == (30, 40)


def test_a_phone_picture_with_a_smaller_one_inside_is_a_still(llava: Loaded, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", size, "teal") for size in ((40, 30), (20, 15))]
    pictures[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert read_question(llava.model, False, "what?", [tmp_path / "phone.jpg"]).images[0].size == (40, 30)


def _animated(folder: Path) -> Path:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    return folder / "moves.gif"


def _cut_off(folder: Path) -> Path:
    whole = (example("scene_0").files[0]).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    return folder / "half.png"


def _text(folder: Path) -> Path:
    (folder / "note.png").write_text("no pixels here", encoding="utf-8")
    return folder / "note.png"


def _huge(folder: Path) -> Path:
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    return folder / "huge.png"


def _bomb(folder: Path) -> Path:
    Image.new("1", (9_000, 5_000)).save(folder / "wide.png")
    return folder / "wide.png"


def _heavy(folder: Path) -> Path:
    path = _saved(folder / "heavy.png")
    with path.open("ab") as file:
        file.truncate(21 * 2**20)
    return path


def _postscript(folder: Path) -> Path:
    # Pillow reads it by running Ghostscript
    (folder / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    return folder / "page.png"


def _film(folder: Path) -> Path:
    path = folder / "film.mp4"
    path.write_bytes(example("films").files[0].read_bytes())
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_animated, "'moves.gif' is animated (3 frames)"),
        (_cut_off, "'half.png' is damaged or cut off"),
        (_text, "'note.png' is not a picture that can be read. Upload a PNG"),
        (_huge, "'huge.png' has more than 40 million pixels"),
        (_bomb, "'wide.png' has more than 40 million pixels"),
        (_heavy, "'heavy.png' has 21.0 MiB; at most 20 MiB"),
        (_postscript, "'page.png' is not a picture"),
        (_film, "'film.mp4' is a film, and LlavaForConditionalGeneration reads pictures only"),
    ],
)
def test_bad_files_are_named_with_what_is_legal(llava: Loaded, tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        read_question(llava.model, False, "what?", [make(tmp_path)])
    assert message in str(raised.value)
    assert str(tmp_path) not in str(raised.value), "where files lie on the server is nobody's business"


def test_bad_films_are_named(tmp_path: Path, llava: Loaded) -> None:
    # looked at before the model is
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as raised:
            read_question(llava.model, True, "what?", [path])
        assert str(tmp_path) not in str(raised.value)
        return str(raised.value)

    whole = _film(tmp_path).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:600])
    assert "'cut.mp4' is not a film that can be read, or is cut off" in refused(tmp_path / "cut.mp4")
    (tmp_path / "text.webm").write_text("no film", encoding="utf-8")
    assert "'text.webm' is not a film" in refused(tmp_path / "text.webm")
    with (tmp_path / "film.mp4").open("ab") as file:
        file.truncate(65 * 2**20)
    assert "'film.mp4' has 65.0 MiB; at most 64 MiB" in refused(tmp_path / "film.mp4")


def test_too_few_and_too_many(llava: Loaded, tmp_path: Path) -> None:
    picture = _saved(tmp_path / "a.png")
    with pytest.raises(InputError, match="There is no question"):
        read_question(llava.model, False, "  ", [picture])
    with pytest.raises(InputError, match="There is no picture"):
        read_question(llava.model, False, "what?", [])
    with pytest.raises(InputError, match="9 files are too many: ask about at most 8"):
        read_question(llava.model, False, "what?", [picture] * 9)


def test_films_are_read_by_models_that_read_them(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers makes the processor of this model with it")
    plus = models["tiny:qwen2_vl_plus"]
    shown = example("films")
    asked = read_question(plus.model, plus.reads_videos, shown.questions[0][0], shown.files)
    assert [len(video.frames) for video in asked.videos] == [8]
    last = _last(plus, asked, Run("fastv", "50%"))
    assert last.answers[0].text == shown.questions[0][1]
    data = survival(asked, [], last.pruned)
    # what the model's own reader says names the file, not where it lies
    write_film(tmp_path / "short.mp4", [Image.new("RGB", (80, 80), "teal")])
    with pytest.raises(InputError, match=r"'short\.mp4' has 1 frame; Qwen2VL") as raised:
        read_question(plus.model, True, "what?", [tmp_path / "short.mp4"])
    assert str(tmp_path) not in str(raised.value)
    # two frames make one grid of tokens
    assert [view["title"] for view in data["views"]] == [f"film, from frame {n}" for n in (1, 3, 5, 7)]


# models


def test_models_are_those_that_were_named(models: Models) -> None:
    with pytest.raises(UnknownNameError, match="model of this demo '/etc'"):
        models["/etc"]
    with pytest.raises(InputError, match="random weights"):
        Models(["random:mini"])
    with pytest.raises(InputError, match="at least one model"):
        Models([])


# settings


def test_settings_become_runs() -> None:
    settings = Settings("tiny:llava", method="fastv", keep="25%", first="flowcut", first_keep="50%", beside="uniform")
    assert settings.runs() == [Run("flowcut@50%+fastv", "25%"), Run("flowcut@50%+uniform", "25%")]
    assert Settings(method="dyvte", keep="25%").runs() == [Run("dyvte", None)]
    assert Settings(method="transprune(layers=(5,6,8))", keep="").runs()[0].keep is None
    assert Settings(method="flowcut/dpp/nearest").runs()[0].method == "flowcut/dpp/nearest"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "nothing"}, UnknownNameError, "Unknown method 'nothing'"),
        ({"method": "fastv", "keep": "0%"}, BudgetError, "'0%'"),
        ({"method": "fastv", "keep": ""}, BudgetError, "got ''"),
        ({"method": "secrets.json"}, UnknownNameError, "'secrets.json'"),
        ({"method": "flowcut+fastv"}, UnknownNameError, "flowcut"),
        ({"method": "flowcut@1/2"}, UnknownNameError, "flowcut"),
        ({"method": "dyvte(weights='/etc')"}, PlanError, "the knob(s) weights of dyvte cannot be set here"),
        ({"method": "relevance(check=False)"}, PlanError, "the knob(s) check of relevance cannot be set here"),
        ({"method": "dyvte(weights='/etc')/dpp"}, PlanError, "weights of dyvte cannot be set here"),
        ({"first": "atp(weights='someone/else')"}, PlanError, "weights of atp cannot be set here"),
        ({"beside": "flowcut(remaining=3)"}, PlanError, "remaining of flowcut cannot be set here"),
        ({"first": "flowcut", "first_keep": "200%"}, BudgetError, "'200%'"),
    ],
)
def test_settings_that_are_not_legal(changes: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        Settings(**{"model": "tiny:llava", **changes}).runs()
    assert message in str(raised.value)


def test_settings_check_their_ranges() -> None:
    with pytest.raises(InputError, match="basis must be one of average, final, got 'flops'"):
        Settings(basis="flops")
    with pytest.raises(InputError, match="1 to 256 new tokens, got 0"):
        Settings(max_new_tokens=0)


def test_a_link_holds_the_settings() -> None:
    from urllib.parse import parse_qsl

    settings = Settings("tiny:internvl", "scene_2", "how many?", "gemfilter(layer=3)", "12%", basis="final")
    assert Settings.from_query(dict(parse_qsl(settings.query())), Settings()) == settings
    assert Settings().query() == ""
    assert Settings.from_query({"__theme": "dark", "keep": "5%"}, Settings()).keep == "5%"
    with pytest.raises(InputError, match="max_new_tokens must be a number, got 'many'"):
        Settings.from_query({"max_new_tokens": "many"}, Settings())


# knobs


def test_every_method_has_fields_for_its_own_knobs_and_no_others() -> None:
    for name in vtprune.methods():
        fields = fields_of(name)
        assert [field.name for field in fields] == public_knobs(name)
        assert all(field.about for field in fields), name
        assert not {"weights", "check", "remaining"} & {field.name for field in fields}
    positions = next(field for field in fields_of("fastv(positions='compact')") if field.name == "positions")
    assert (positions.value, positions.choices) == ("compact", ("keep", "compact"))
    text_cut = next(field for field in fields_of("flowcut") if field.name == "text_cut")
    assert text_cut.choices == ("True", "False", "as the method has it")


@pytest.mark.parametrize(
    ("text", "knob", "value", "becomes"),
    [
        ("fastv", "layer", "3", "fastv(layer=3)"),
        ("fastv(layer=3)", "positions", "compact", "fastv(layer=3, positions='compact')"),
        ("fastv(layer=3)", "layer", "", "fastv"),
        ("fastv(layer=3)", "layer", "as the method has it", "fastv"),
        ("flowcut", "history", "0.5", "flowcut"),
        ("transprune", "layers", "5,6,8", "transprune(layers=(5, 6, 8))"),
        ("flowcut/dpp/nearest", "every", "1", "flowcut(every=1)/dpp/nearest"),
    ],
)
def test_a_knob_is_written_into_the_method(text: str, knob: str, value: str, becomes: str) -> None:
    assert with_knob(text, knob, value) == becomes
    assert read_method(becomes) == becomes


def test_an_illegal_knob_is_refused() -> None:
    with pytest.raises(PlanError, match="history"):
        with_knob("flowcut", "history", "much")


# asking


def test_a_stream_computes_only_when_asked(llava: Loaded, question: Question) -> None:
    inputs = prompt_inputs(llava.model, llava.processor, [question])
    whole = llava.copy().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    model = llava.copy()
    passes = []
    model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    stream = TokenStream(model, inputs, max_new_tokens=8)
    assert passes == []
    ids = []
    while (token := stream.step()) is not None:
        ids.append(token)
        # long enough for several more, if nothing held it
        time.sleep(0.2)
        assert len(passes) == len(ids)
    assert ids == stream.ids == whole.tolist()
    assert len(stream.seconds) == len(ids)
    assert stream.step() is None


def test_a_closed_stream_ends_its_thread(llava: Loaded, question: Question) -> None:
    inputs = prompt_inputs(llava.model, llava.processor, [question])
    before = threading.active_count()
    stream = TokenStream(llava.copy(), inputs, max_new_tokens=64, min_new_tokens=64)
    stream.step()
    assert threading.active_count() > before
    stream.close()
    stream.close()
    assert threading.active_count() == before
    TokenStream(llava.copy(), inputs, max_new_tokens=2).close()


def test_a_stream_raises_what_the_model_raised(llava: Loaded) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        TokenStream(llava.copy(), {"input_ids": torch.ones(1, 3, dtype=torch.long)}, no_such_option=1).step()


@pytest.mark.parametrize(
    ("full", "pruned", "agrees", "same"),
    [
        ([5, 6, 3], [5, 6, 3], 3, True),
        ([5, 6, 3], [5, 7, 3], 1, False),
        ([5, 6, 3], [5], 2, False),
        ([5], [5, 6], 1, False),
        ([], [], 0, True),
    ],
)
def test_agreement(full: list[int], pruned: list[int], agrees: int, same: bool) -> None:
    answer = Answer("", None, pruned, agrees=agreement(full, pruned))
    assert (answer.agrees, answer.same) == (agrees, same)


def test_a_question_is_answered_and_timed(llava: Loaded, question: Question) -> None:
    phases, shown = [], []
    for state in race(llava, question, [Run("flowcut", "25%"), Run("fastv", "1/9")], 8, patience_s=0.1):
        phases.append(state.phase)
        shown.append(state.answers[0].text)
    # a word, another one, the end of the sequence, and that there is nothing behind it
    assert shown[:4] == ["bottom", "bottom left", "bottom left", "bottom left"]
    assert phases.count("answering") == 4
    assert sorted(set(phases)) == ["answering", "done", "measuring"]
    full, flowcut, fastv = state.answers
    assert (full.text, flowcut.text) == ("bottom left", "bottom left")
    assert flowcut.same
    assert fastv.text != full.text
    assert not fastv.same
    for answer in (flowcut, fastv):
        model, inputs = llava.copy(), prompt_inputs(llava.model, llava.processor, [question])
        with vtprune.prune(model, answer.run.method, keep=answer.run.keep) as session:
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert answer.ids == out[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.report.tokens_per_layer == session.report.tokens_per_layer
    assert all(answer.prefill_s > 0 and answer.tokens_per_s > 0 for answer in state.answers)
    assert 1 <= state.rounds <= 5


def test_a_question_that_is_given_up_leaves_nothing(llava: Loaded, question: Question) -> None:
    before = threading.active_count()
    asked = race(llava, question, [Run("flowcut", "25%")], 64)
    next(asked)
    asked.close()
    assert threading.active_count() == before
    assert _last(llava, question, Run("flowcut", "25%")).answers[1].same


def test_questions_at_once_do_not_meet(llava: Loaded) -> None:
    asked = [
        read_question(llava.model, False, text, example(name).files)
        for name, text in (("scene_1", QUESTION), ("scene_0", "where is the yellow circle?"))
    ]
    runs = [Run("flowcut", "25%"), Run("divprune", "50%")]
    alone = [_last(llava, question, run).answers for question, run in zip(asked, runs, strict=True)]
    together = [race(llava, question, [run], 8, patience_s=0) for question, run in zip(asked, runs, strict=True)]
    ends: list[Any] = [None, None]
    while together[0] is not None or together[1] is not None:
        for index, each in enumerate(together):
            state = None if each is None else next(each, None)
            ends[index] = state or ends[index]
            together[index] = each if state is not None else None
    for one, both in zip(alone, ends, strict=True):
        assert [answer.ids for answer in one] == [answer.ids for answer in both.answers]
        assert one[1].report.kept[0].indices[0].equal(both.answers[1].report.kept[0].indices[0])


def test_what_cannot_be_attached_is_said_before_anything_runs(llava: Loaded, question: Question) -> None:
    with pytest.raises(BudgetError, match="fastv cannot reach"):
        next(race(llava, question, [Run("flowcut", "25%"), Run("fastv", "2%")], 8))


# what is shown


def test_survival_says_when_each_token_left(llava: Loaded, question: Question) -> None:
    last = _last(llava, question, Run("flowcut@50%+fastv", "30%"), Run("pool", "25%"))
    seen = pictures_seen(llava.processor, last.inputs, question.images)
    assert [image.size for image in seen] == [(128, 128)]
    data = survival(question, seen, last.pruned)
    json.dumps(data)
    (view,) = data["views"]
    assert (view["rows"], view["cols"], view["stride"], view["first"]) == (16, 16, 16, 0)
    assert view["src"].startswith("data:image/png;base64,")
    chain, pool = data["runs"]
    report = last.pruned[0].report
    assert [step["label"] for step in chain["steps"]][:3] == ["the picture", "after tower block 2", "decoder layer 0"]
    # what the steps say is what the report says
    assert [step["left"] for step in chain["steps"]] == [256, 128, *report.tokens_per_layer[0]]
    tower, layer = report.kept
    for token, gone in enumerate(chain["gone"]):
        expected = None
        if token not in tower.indices[0].tolist():
            expected = 1
        elif token not in layer.indices[0].tolist():
            expected = 2 + layer.site.index
        assert gone == expected
    assert [scored["label"] for scored in chain["scores"]] == ["after tower block 2", "before decoder layer 1"]
    first, second = chain["scores"]
    assert None not in first["values"]
    assert [token for token, value in enumerate(second["values"]) if value is not None] == tower.indices[0].tolist()
    kept = {token for token, gone in enumerate(chain["gone"]) if gone != 1}
    assert min(first["values"][t] for t in kept) >= max(v for t, v in enumerate(first["values"]) if t not in kept)
    # pooling merges: every token that left went into one that stayed
    assert all((gone is None) == (into is None) for gone, into in zip(pool["gone"], pool["into"], strict=True))
    assert {pool["gone"][into] for into in pool["into"] if into is not None} == {None}
    assert set(chain["into"]) == {None}


def test_survival_of_a_restart_and_of_everything(llava: Loaded, question: Question) -> None:
    last = _last(llava, question, Run("gemfilter(layer=3)", "50%"), Run("fastv", "100%"))
    gem, all_of_it = (survival_of(answer.report) for answer in last.pruned)
    assert gem["steps"][1]["label"] == "restart from layer 3"
    assert gem["steps"][1]["left"] == gem["steps"][-1]["left"] < 256
    assert set(all_of_it["gone"]) == {None}
    assert {step["left"] for step in all_of_it["steps"]} == {256}


def test_cards_escape_what_comes_from_outside() -> None:
    evil = "<img src=x onerror=alert(1)>"
    answer = Answer(evil, Run(evil, evil), [1], evil, True, agrees=0)
    state = Race("done", [Answer("unpruned", None, [2], "yes & no", True), answer], {})
    html = answers_html(state) + error_html(evil)
    assert "<img" not in html
    assert "&lt;img" in html
    assert "yes &amp; no" in html


def test_cards_mark_words_that_differ() -> None:
    full = Answer("unpruned", None, [1, 2, 3], "a red circle", True)
    other = Answer("fastv", Run("fastv", "9%"), [1, 4, 3], "a blue circle", True, agrees=1)
    silent = Answer("uniform", Run("uniform", "9%"), [3], "", True, agrees=0)
    same = Answer("flowcut", Run("flowcut", "9%"), [1, 2, 3], "a red circle", True, agrees=3)
    html = answers_html(Race("done", [full, other, silent, same], {}))
    assert re.findall("<mark>(.*?)</mark>", html) == ["blue", "(nothing)"]
    assert "differs from token 2 on" in html
    assert html.count("same answer") == 1
    assert "vtp-caret" not in html
    full.finished = False
    assert "vtp-caret" in answers_html(Race("answering", [full], {}))


def test_costs_are_those_of_the_report(llava: Loaded, question: Question) -> None:
    last = _last(llava, question, Run("flowcut", "25%"), patience_s=0.1)
    report = last.pruned[0].report
    html = costs_html(last)
    assert f"{100 * report.flops / report.flops_full:.3g} %" in html
    assert f"{100 * report.kv_bytes / report.kv_bytes_full:.3g} %" in html
    shares = re.findall(r'vtp-share">([\d.]+) %', html)
    assert len(shares) == 6
    assert float(shares[0]) == 25
    # slower decoding is worse and faster prefill better
    last.answers[0].prefill_s, last.pruned[0].prefill_s = 2.0, 1.0
    last.answers[0].tokens_per_s, last.pruned[0].tokens_per_s = 4.0, 2.0
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th><td>[^<]*</td><td class="([^"]*)"', costs_html(last)))
    assert (rows["prefill time"], rows["decoding"]) == ("vtp-better", "vtp-worse")
    last.rounds = 0
    last.answers[0].prefill_s = None
    assert "Measuring times." in costs_html(last)
    assert costs_html(Race("answering", [last.answers[0]], {})) == ""


# the budget sweep


def test_stability_falls_with_the_budget(llava: Loaded, question: Question) -> None:
    keeps = ("100%", "25%", "1/9", "1/36")
    points = list(stability(llava, question, [Run("flowcut", "25%"), Run("fastv", "25%")], 8, keeps))
    flowcut, fastv = points[:4], points[4:]
    assert [point.keep for point in flowcut] == list(keeps)
    assert [point.same for point in flowcut] == [True, True, False, False]
    assert flowcut[0].share == 1.0
    assert flowcut[0].probability > 0.9 > 0.5 > flowcut[2].probability
    assert (fastv[3].probability, fastv[3].same) == (None, None)
    assert "fastv cannot reach" in fastv[3].message
    html = points_html(points)
    assert html.count("<tr>") == 3
    assert 'title="fastv cannot reach' in html


def test_stability_agrees_with_the_greedy_answer(llava: Loaded) -> None:
    for name in ("scene_0", "scene_2"):
        for text, _ in example(name).questions:
            asked = read_question(llava.model, False, text, example(name).files)
            run = Run("flowcut", "1/16")
            (point,) = stability(llava, asked, [run], 8, ("1/16",))
            assert point.same == _last(llava, asked, run).answers[1].same


def test_stability_of_a_method_that_decides_is_one_point(llava: Loaded, question: Question) -> None:
    (point,) = stability(llava, question, [Run("dyvte", None)], 8)
    assert point.keep == "its own choice"
    assert 0 < point.share < 1


# what can be taken away


def test_the_plan_and_the_record_repeat_the_answer(llava: Loaded, question: Question, tmp_path: Path) -> None:
    settings = Settings("tiny:llava", "scene_1", QUESTION, "flowcut", "25%")
    last = _last(llava, question, *settings.runs())
    result = json.loads(json.dumps(result_of(last, settings)))
    downloads = Downloads()
    saved = Path(downloads.write("kept.json", record_of(last, settings)))
    assert saved.name == "kept.json"
    record = json.loads(saved.read_text(encoding="utf-8"))
    assert record["settings"]["question"] == QUESTION
    assert record["versions"]["vtprune"] == vtprune.__version__
    plan = vtprune.Plan.from_dict(result["pruned"][0]["plan"])
    for what in (plan, vtprune.replay(plan, record["kept"])):
        model = llava.copy()
        with vtprune.prune(model, what) as session:
            out = model.generate(**last.inputs, max_new_tokens=8, do_sample=False)
        assert session.report.to_dict()["kept"][0]["indices"] == record["kept"][0]["indices"]
        assert llava.decode(out[0, last.inputs["input_ids"].shape[1] :].tolist()) == last.answers[1].text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("scene_1", {"method": "flowcut", "keep": "25%"}),
        ("scene_0", {"method": "fastv", "keep": "1/9", "first": "flowcut", "first_keep": "50%"}),
        ("scene_2", {"method": "dyvte"}),
        ("scene_2", {"method": "uniform", "keep": "9%", "basis": "final"}),
        ("pairs", {"model": "tiny:qwen2_vl_plus", "method": "divprune", "keep": "50%"}),
        ("films", {"model": "tiny:qwen2_vl_plus", "method": "flowcut/dpp/nearest", "keep": "50%"}),
    ],
)
def test_code_and_command_run_and_say_the_same(models: Models, name: str, changes: dict[str, str]) -> None:
    shown = example(name)
    settings = Settings(**{"model": "tiny:llava", "example": name, "question": shown.questions[0][0], **changes})
    (run,) = settings.runs()
    loaded = models[settings.model]
    asked = read_question(loaded.model, loaded.reads_videos, settings.question, shown.files)
    last = _last(loaded, asked, run)
    answer = last.answers[1]

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(python_lines(settings, run, ()), "code", "exec"), {})
    out = printed.getvalue()
    assert out.splitlines()[0].strip() == answer.text
    assert answer.report.summary() in out
    program, *words = shlex.split(command_line(settings, run, ()))
    assert program == "vtprune"
    ran = CliRunner().invoke(cli.app, words)
    assert ran.exit_code == 0, ran.output
    told = re.search(r"^answer +(.*)$", ran.output, re.MULTILINE)
    assert told[1].split()[: 2 * len(answer.text.split())][len(last.answers[0].text.split()) :] == answer.text.split()
    assert f"{answer.report.average_tokens[0]:.1f}" in ran.output


def test_code_names_files_that_were_uploaded() -> None:
    settings = Settings("tiny:llava", "", "what's this?", "fastv", "64")
    (run,) = settings.runs()
    lines = python_lines(settings, run, ["my photo.png", "clip.MP4"])
    compile(lines, "code", "exec")
    assert "images, videos = [Path('my photo.png')], [Path('clip.MP4')]" in lines
    command = command_line(settings, run, ["my photo.png", "clip.MP4"])
    assert "--image 'my photo.png' --video clip.MP4" in command
    assert "--keep 64" in command


# keeping to this machine


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"data": [{"path": "/tmp/a.png", "url": "http://localhost/a.png"}]}, []),
        ({"data": [[{"image": {"path": "https://example.org/a.png"}}]]}, ["https://example.org/a.png"]),
        ([{"path": " HTTP://example.org"}, {"path": "ftp://x"}, {"path": 3}], [" HTTP://example.org", "ftp://x"]),
        ("https://example.org", []),
    ],
)
def test_addresses_are_found_wherever_they_are(data: Any, found: list[str]) -> None:
    assert list(addresses_in(data)) == found


def _ask_guard(method: str, path: str, body: bytes, kind: bytes = b"application/json") -> tuple[int, bytes, dict]:
    """Status, body and headers that the guard lets through from an app that echoes."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind)]}
    asyncio.run(Guard(app)(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], sent[1]["body"], headers


def test_the_guard_lets_through_what_names_no_address() -> None:
    body = b'{"data": [{"path": "/tmp/gradio/a.png"}]}'
    status, echoed, headers = _ask_guard("POST", "/gradio_api/queue/join", body)
    assert (status, echoed) == (200, body)
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"
    form = b'--x\r\n{"path": "http://example.org"}'
    assert _ask_guard("POST", "/gradio_api/upload", form, b"multipart/form-data; boundary=x")[1] == form
    assert _ask_guard("POST", "/x", b"not json")[0] == 200


def test_the_guard_refuses_addresses_however_they_are_written() -> None:
    for body in (
        b'{"data": [{"path": "http://169.254.169.254/latest"}]}',
        b'{"data": [{"path": "\\u0068ttp://example.org/a.png", "meta": {"_type": "gradio.FileData"}}]}',
    ):
        status, answer, _ = _ask_guard("POST", "/gradio_api/queue/join", body)
        assert status == 400
        assert b"is an address, and this demo fetches none" in answer
    assert _ask_guard("GET", "/gradio_api/file=https://example.org/a.png", b"")[0] == 400
    status, answer, _ = _ask_guard("POST", "/gradio_api/queue/join", b'"' + b"x" * (5 * 2**20) + b'"')
    assert (status, b"larger than 4 MiB" in answer) == (400, True)


# examples


def test_examples_that_ship_are_those_that_their_code_makes(tmp_path: Path) -> None:
    from vtprune.tiny.shipped import write_examples

    write_examples(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {file.name for each in examples().values() for file in each.files} | {"examples.json"}
    for each in examples().values():
        for picture in each.images:
            with Image.open(picture) as ours, Image.open(tmp_path / picture.name) as again:
                assert ours.tobytes() == again.tobytes()
    listing = example("scene_0").files[0].parent / "examples.json"
    assert (tmp_path / "examples.json").read_text(encoding="utf-8") == listing.read_text(encoding="utf-8")


def test_examples_are_answered_by_the_models_that_they_name(models: Models) -> None:
    pytest.importorskip("torchvision", reason="transformers makes the processor of this model with it")
    plus = models["tiny:qwen2_vl_plus"]
    for name in ("words", "gaps", "pairs", "films"):
        shown = example(name)
        for text, answer in shown.questions:
            asked = read_question(plus.model, True, text, shown.files)
            assert _last(plus, asked).answers[0].text == answer
