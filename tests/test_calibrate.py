"""`vtprune calibrate`: agreement by hand on a random model, the choice rule, the command and its errors."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from models import LAYERS, TOKENS, Row, batch, llava
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.calibrate import LayerRow, calibrate_gemfilter, candidate_layers, choose_layer
from vtprune.calibrate import _Force as Force
from vtprune.cli import app
from vtprune.commands.calibrate import read_layers, read_questions
from vtprune.errors import BudgetError, InputError
from vtprune.images import load_example
from vtprune.tiny import tiny_folder

needs_embedded = pytest.mark.skipif(
    not (tiny_folder("llava") / "config.json").is_file(), reason="the embedded checkpoint is not in this tree"
)
PROMPTS = [batch(Row(seed=seed)) for seed in range(3)]
KEEP, STEPS = 4, 5


def _invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["calibrate", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def _fails(*args: object) -> str:
    code, _, error = _invoke(*args)
    assert code == 2
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize("layer", [1, 2])
def test_agreement_equals_the_short_sequence_run_by_hand(layer: int) -> None:
    (row,) = calibrate_gemfilter(llava(), PROMPTS, KEEP, [layer], max_new_tokens=STEPS)
    model = llava()
    flops = flops_full = 0
    for prompt, log_prob, same in zip(PROMPTS, row.log_probs, row.same, strict=True):
        length = prompt["input_ids"].shape[1]
        answer = model.generate(**prompt, max_new_tokens=STEPS, do_sample=False)[0, length:]
        with vtprune.prune(model, vtprune.GemFilter(layer=layer), KEEP, basis="final") as session, torch.no_grad():
            model(**prompt)
            kept = session.report.kept[-1].indices[0]
            flops, flops_full = flops + session.report.flops, flops_full + session.report.flops_full
            mine = model.generate(**prompt, max_new_tokens=STEPS, do_sample=False)[0, length:]
        assert len(kept) == KEEP
        # the survivors at their places, with the answer behind the prompt, in one call of the bare decoder
        inner = model.model
        visual = prompt["input_ids"][0] == model.config.image_token_id
        with torch.no_grad():
            embedded = model.get_input_embeddings()(prompt["input_ids"][0])
            embedded[visual] = inner.get_image_features(prompt["pixel_values"]).pooler_output[0]
            stays = ~visual
            stays[visual.nonzero()[kept, 0]] = True
            short = torch.cat([embedded[stays], model.get_input_embeddings()(answer)])
            places = torch.cat([stays.nonzero()[:, 0], length + torch.arange(STEPS)])
            hidden = inner.language_model(inputs_embeds=short[None], position_ids=places[None]).last_hidden_state[0]
            log_probs = model.lm_head(hidden[-STEPS - 1 : -1]).log_softmax(-1)
        by_hand = sum(log_probs[i, token].item() for i, token in enumerate(answer)) / STEPS
        assert log_prob == pytest.approx(by_hand, abs=1e-4)
        assert same == (mine.tolist() == answer.tolist())
    assert (row.flops, row.flops_full) == (flops, flops_full)


def test_everything_kept_agrees_with_itself() -> None:
    rows = calibrate_gemfilter(llava(), PROMPTS, TOKENS, [0, 3], max_new_tokens=STEPS)
    assert [row.same_share for row in rows] == [1.0, 1.0]
    assert rows[0].log_probs == rows[1].log_probs
    assert rows[0].flops_share == 1.0


def test_forcing_overrules_the_pruned_model_and_notices() -> None:
    (row,) = calibrate_gemfilter(llava(), PROMPTS, 1, [1], max_new_tokens=STEPS)
    assert not all(row.same)
    assert row.same_share == sum(row.same) / 3
    assert row.log_prob == pytest.approx(sum(row.log_probs) / 3)


def test_layers_are_sorted_and_told() -> None:
    told = []
    rows = calibrate_gemfilter(llava(), PROMPTS, "25%", [3, 1, 3], max_new_tokens=1, tell=lambda: told.append(1))
    assert [row.layer for row in rows] == [1, 3]
    assert len(told) == 3 * (1 + 2)
    # an earlier filter costs less
    assert rows[0].flops_share < rows[1].flops_share


def test_the_longest_answer_changes_the_mean() -> None:
    short, long = (calibrate_gemfilter(llava(), PROMPTS, KEEP, [1], max_new_tokens=n)[0].log_prob for n in (1, 4))
    assert short != long


def test_the_model_is_left_unpruned() -> None:
    model = llava()
    before = model(**PROMPTS[0]).logits
    calibrate_gemfilter(model, PROMPTS, KEEP, [1], max_new_tokens=1)
    assert torch.equal(model(**PROMPTS[0]).logits, before)


def test_one_token_of_its_own_is_not_the_same_answer() -> None:
    force = Force(torch.tensor([1, 2]))
    for best in (0, 2):
        forced = force(torch.zeros(1, 1, dtype=torch.long), torch.eye(3)[best][None])
    assert forced[0].argmax() == 2
    assert not force.same


def test_generation_settings_of_the_checkpoint_change_nothing() -> None:
    model, want = llava(), calibrate_gemfilter(llava(), PROMPTS, KEEP, [1], max_new_tokens=STEPS)
    for settings in ({"do_sample": True, "temperature": 9.0}, {"num_beams": 3}):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        assert calibrate_gemfilter(model, PROMPTS, KEEP, [1], max_new_tokens=STEPS) == want


def test_two_thirds_of_the_depth_are_tried() -> None:
    assert candidate_layers(12) == list(range(9))
    assert candidate_layers(LAYERS) == [0, 1, 2]
    assert candidate_layers(1) == [0]


def _row(layer: int, *log_probs: float) -> LayerRow:
    return LayerRow(layer, log_probs, (True,) * len(log_probs), 1, 2)


def test_the_first_layer_within_one_standard_error_is_chosen() -> None:
    best = _row(5, -1.0, -1.0, -1.0)
    # differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3) = 0.058
    assert choose_layer([_row(1, -1.1, -1.2, -1.3), best]) == 5
    # differences 0.5, 0.2, -0.1: mean 0.2, standard error 0.3 / sqrt(3) = 0.17
    assert choose_layer([_row(1, -1.5, -1.2, -0.9), best]) == 5
    # differences 0.5, 0.5, -0.4: mean 0.2, standard error 0.52 / sqrt(3) = 0.3
    assert choose_layer([_row(1, -1.5, -1.5, -0.6), best]) == 1
    assert choose_layer([_row(1, -9.0, -9.0, -9.0), _row(3, -1.5, -1.5, -0.6), best]) == 3
    # layers behind the best one are never chosen
    assert choose_layer([best, _row(7, -1.0, -1.0, -1.0)]) == 5


def test_samples_are_paired() -> None:
    # samples differ by far more than layers do, in step
    assert choose_layer([_row(1, -9.1, -0.2, -4.1), _row(2, -9.0, -0.1, -4.0)]) == 2


@pytest.mark.parametrize("lost", [0.1, 0.3, 3.0, 1e-3])
def test_one_sample_that_differs_is_within(lost: float) -> None:
    for n in range(2, 20):
        assert choose_layer([_row(1, -lost, *[0.0] * (n - 1)), _row(2, *[0.0] * n)]) == 1


@pytest.mark.parametrize("rows", [[], [_row(1, -1.0)]])
def test_a_choice_needs_rows_and_two_samples(rows: list[LayerRow]) -> None:
    with pytest.raises(InputError, match="at least two samples"):
        choose_layer(rows)


def test_bad_input_is_refused() -> None:
    model = llava()
    with pytest.raises(InputError, match=r"in \[0, 3\] \(4 decoder layers\), got \[-1, 4, 9\]"):
        calibrate_gemfilter(model, PROMPTS, KEEP, [9, 1, 4, -1])
    with pytest.raises(InputError, match="got 0 and 1"):
        calibrate_gemfilter(model, [], KEEP, [1])
    with pytest.raises(InputError, match="got 3 and 0"):
        calibrate_gemfilter(model, PROMPTS, KEEP, [])
    with pytest.raises(InputError, match="got a batch of 2"):
        calibrate_gemfilter(model, [batch(Row(), Row(seed=1))], KEEP, [1])
    with pytest.raises(BudgetError):
        calibrate_gemfilter(model, PROMPTS, 0, [1])


@needs_embedded
def test_the_command_on_the_embedded_model(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    options = ("--samples", 3, "--layers", "3, 1", "--keep", "1/8", "--seed", 2, "--max-new-tokens", 4)
    code, shown, _ = _invoke("gemfilter", "--model", "tiny:llava", *options, "--out", out)
    assert code == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = [
        LayerRow(r["layer"], tuple(r["log_probs"]), tuple(r["same"]), r["flops"], r["flops_full"])
        for r in result["layers"]
    ]
    assert [row.layer for row in rows] == [1, 3]
    assert [len(row.same) for row in rows] == [3, 3]
    assert [r["log_prob"] for r in result["layers"]] == [row.log_prob for row in rows]
    assert [r["same_share"] for r in result["layers"]] == [row.same_share for row in rows]
    assert result["layer"] == choose_layer(rows)
    wanted = {
        "method": "gemfilter",
        "model": "tiny:llava",
        "data": None,
        "samples": 3,
        "keep": 0.125,
        "basis": "final",
        "max_new_tokens": 4,
        "seed": 2,
        "dtype": "float32",
    }
    assert {name: result[name] for name in wanted} == wanted
    assert set(result["versions"]) == {"vtprune", "torch", "transformers", "python"}
    assert f"vtprune.GemFilter(layer={result['layer']})" in shown
    assert 'keep="1/8", basis="final"' in shown
    lines = [line.split() for line in shown.splitlines()]
    (chosen,) = [line for line in lines if line[-1:] == ["chosen"]]
    assert int(chosen[0]) == result["layer"]
    assert [f"{rows[0].log_prob:.4f}" in line for line in lines].count(True) == 1


@needs_embedded
def test_seed_and_longest_answer_change_the_result(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    found = []
    for options in (("--seed", 0), ("--seed", 1), ("--seed", 0, "--max-new-tokens", 1)):
        wanted = ("gemfilter", "--samples", 2, "--layers", 0, "--dtype", "bfloat16", "--device", "cpu", *options)
        assert _invoke(*wanted, "--out", out)[0] == 0
        found.append(json.loads(out.read_text(encoding="utf-8")))
    assert found[0]["layers"] != found[1]["layers"]
    assert found[0]["layers"] != found[2]["layers"]
    assert found[0]["dtype"] == "bfloat16"


@needs_embedded
def test_questions_come_from_the_dev_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.tiny import scenes

    asked, real = [], scenes.scene_questions
    monkeypatch.setattr(scenes, "scene_questions", lambda split, *a, **k: asked.append(split) or real(split, *a, **k))
    assert _invoke("gemfilter", "--samples", 2, "--layers", 0, "--max-new-tokens", 1)[0] == 0
    assert asked == ["dev"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three questions about the shipped example."""
    image, question = load_example()
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "one.png")
    line = json.dumps({"image": "images/one.png", "question": question})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{line}\n\n{line}\n{line}\n", encoding="utf-8")
    return path


@needs_embedded
def test_own_data_and_a_model_folder(data: Path) -> None:
    out = data.parent / "out.json"
    options = ("--model", tiny_folder("llava"), "--data", data, "--samples", 2, "--layers", 1)
    assert _invoke("gemfilter", *options, "--out", out)[0] == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["samples"], result["data"], result["seed"]) == (2, "data.jsonl", None)
    # the same question twice
    one, two = result["layers"][0]["log_probs"]
    assert one == two


@needs_embedded
def test_data_is_read_up_to_the_number_of_samples(data: Path) -> None:
    assert len(read_questions(data, 2)) == 2
    assert len(read_questions(data, 9)) == 3
    assert read_questions(data, 9)[0].images[0].size == load_example()[0].size


@needs_embedded
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*bad.jsonl' is not JSON"),
        ("[1]", r"line 2 of .*must be .*got \[1\]"),
        ('{"image": "images/one.png"}', r"line 2 of .*must be"),
        ('{"image": "images/one.png", "question": 3}', r"line 2 of .*must be"),
        ('{"image": "", "question": "why?"}', r"line 2 of .*must be"),
        ('{"image": "none.png", "question": "why?"}', r"line 2 of .*there is no image file .*none.png"),
        ('{"image": "data.jsonl", "question": "why?"}', r"line 2 of .*not an image"),
        ("", r"holds 1 question"),
    ],
)
def test_malformed_data_names_the_line(data: Path, line: str, message: str) -> None:
    bad = data.parent / "bad.jsonl"
    bad.write_text(data.read_text(encoding="utf-8").splitlines()[0] + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_questions(bad, 9)


def test_layers_are_numbers() -> None:
    assert read_layers("1, 2,3") == [1, 2, 3]
    for text in ("", "1,", "-1", "a", "1.5", "0-3"):
        with pytest.raises(InputError, match="separated by commas"):
            read_layers(text)


@needs_embedded
def test_the_command_refuses_what_it_cannot_use(data: Path) -> None:
    message = _fails("fastv")
    assert "Unknown method to calibrate 'fastv'" in message
    assert "Available: gemfilter" in message
    assert "there is no data file" in _fails("gemfilter", "--data", "none.jsonl")
    assert "needs --data FILE" in _fails("gemfilter", "--model", "some/model")
    assert "has random weights" in _fails("gemfilter", "--model", "random:mini", "--data", data)
    assert "keep must be" in _fails("gemfilter", "--keep", "2.5")
    assert "got 'nowhere'" in _fails("gemfilter", "--layers", 0, "--device", "nowhere")
    assert "got 'float8'" in _fails("gemfilter", "--layers", 0, "--dtype", "float8")
    assert "--samples" in _invoke("gemfilter", "--samples", 1)[2]


@needs_embedded
def test_the_command_refuses_layers_of_another_model() -> None:
    assert "in [0, 11] (12 decoder layers), got [12]" in _fails("gemfilter", "--samples", 2, "--layers", "1,12")


def test_help_lists_it() -> None:
    assert "calibrate" in CliRunner().invoke(app, ["--help"]).stdout


@needs_embedded
def test_every_page_shows_the_figure_that_the_script_draws() -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    script = runpy.run_path(str(docs / "figures.py"))
    for figure in script["figures"]():
        page = docs / "methods" / f"{figure.file.removeprefix('kept_').removesuffix('.png')}.md"
        assert f"](../assets/{figure.file})" in page.read_text(encoding="utf-8")
        path = docs / "assets" / figure.file
        assert path.stat().st_size < 120_000
        with Image.open(path) as shown:
            assert script["draw"](figure, *vtprune.load_tiny("llava")).size == shown.size
