"""The vLLM plugin as far as it runs without vLLM; tests/serving has the rest."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, Row
from models import llava
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.commands.serve import server_flags
from vtprune.contract import METHODS
from vtprune.errors import BudgetError, InputError, PlanError, UnknownNameError, UnsupportedModelError, VtpruneError
from vtprune.hooks import geometry
from vtprune.hooks.families.base import family_of
from vtprune.integrations import vllm as plugin
from vtprune.integrations.vllm.bench import Served, ratios
from vtprune.integrations.vllm.embedded import export, widened
from vtprune.integrations.vllm.images import ImagePruner, checked_geometry
from vtprune.integrations.vllm.rope import Span, fill_positions, restored_prompt, with_cells, without_cells
from vtprune.integrations.vllm.settings import Settings, architecture_of, check_served, kept_of_image, served_methods
from vtprune.specs import parse_method

KINDS = ("llava", "qwen2_vl", "qwen2_5_vl", "internvl")
SERVED = (
    "divprune",
    "fastervlm",
    "hiprune",
    "holov",
    "pool",
    "prumerge",
    "prumerge-plus",
    "random",
    "scope",
    "uniform",
)
SERVED += ("tome", "visionzip", "vispruner")


class _Registry:
    """Stands for vLLM's."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def register_model(self, name: str, place: str) -> None:
        self.known[name] = place


def _fake_vllm(monkeypatch: pytest.MonkeyPatch, version: str) -> _Registry:
    fake: Any = types.ModuleType("vllm")
    fake.ModelRegistry, fake.__version__ = _Registry(), version
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake.ModelRegistry


def test_the_release_it_was_built_on_gets_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = _fake_vllm(monkeypatch, "0.32.1+cpu")
    plugin.register()
    plugin.register()
    assert registry.known == plugin.ARCHITECTURES


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.32.0", "0.3.2"])
def test_another_release_is_refused_only_when_it_is_asked_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = _fake_vllm(monkeypatch, version)
    plugin.register()
    assert set(registry.known) == set(plugin.ARCHITECTURES)
    for place in registry.known.values():
        module = place.partition(":")[0]
        sys.modules.pop(module, None)
        with pytest.raises(VtpruneError, match=rf"works with vLLM 0\.32\.x, and this is vLLM {version}"):
            importlib.import_module(module)


def test_the_extra_installs_the_release_it_was_built_on() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    major, minor = map(int, plugin.SUPPORTED.split("."))
    assert f'\nvllm = ["vllm>={major}.{minor},<{major}.{minor + 1}"]\n' in project


def test_nothing_of_it_needs_vllm_but_the_class() -> None:
    assert "vllm" not in sys.modules or importlib.util.find_spec("vllm") is not None
    for module, _, name in (place.partition(":") for place in plugin.ARCHITECTURES.values()):
        assert importlib.util.find_spec(module) is not None
        assert name


@pytest.mark.parametrize(
    ("raw", "error", "said"),
    [
        (None, InputError, "got vtprune=None"),
        ({"method": "divprune"}, InputError, "got vtprune={'method': 'divprune'}"),
        ({"method": "divprune", "keep": 8, "seed": 1}, InputError, "'seed': 1"),
        ({"method": 7, "keep": 8}, InputError, "'method': 7"),
        ({"method": "divprun", "keep": 8}, UnknownNameError, "Did you mean 'divprune'"),
        ({"method": "divprune", "keep": 0}, BudgetError, "vtprune_keep: keep must be an int >= 1 .* got 0"),
        ({"method": "divprune", "keep": True}, BudgetError, "got True"),
        ({"method": "divprune@1/2+uniform", "keep": 8}, PlanError, "one method without a budget"),
        ({"method": "divprune@1/2", "keep": 8}, PlanError, "one method without a budget"),
    ],
)
def test_wrong_settings_say_what_is_wrong(raw: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        Settings.read(raw)
    assert isinstance(caught.value, ValueError)  # which vLLM answers with a 400


def test_settings_read_budgets_and_tell_themselves_apart() -> None:
    first, second = ({"method": "divprune", "keep": keep} for keep in (1, 1.0))
    assert Settings.read({"method": "divprune", "keep": "25%"}).keep == 0.25
    assert Settings.read(first).key != Settings.read(second).key
    assert Settings.read(first).key != Settings.read({"method": "uniform", "keep": 1}).key


@pytest.mark.parametrize("kind", KINDS)
def test_methods_are_served_by_what_they_need(kind: str) -> None:
    reasons = served_methods(geometry(CASES[kind].config()))
    assert set(SERVED) <= {name for name, reason in reasons.items() if not reason}
    for name in ("fastv", "gemfilter", "transprune", "sparsevlm", "pyramiddrop"):
        assert "inside the decoder" in reasons[name]
    assert reasons["cdpruner"] == ""
    assert "decides itself" in reasons["dyvte"]
    assert "frames of a film" in reasons["vidcom2"]
    # cuts in the tower alone on LLaVA, and in the decoder too where images have many tokens
    assert reasons["flowcut"] == "" if kind in ("llava", "internvl") else "text_cut=False" in reasons["flowcut"]


def test_the_page_lists_every_method_where_it_belongs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (served[a-z ]*|refused: [a-z ]+) \| ([a-z0-9, -]+) \|$", page, re.MULTILINE))
    found: dict[str, list[str]] = {title: [] for title in rows}
    for name, reason in served_methods(geometry(CASES["llava"].config())).items():
        title = "served with a question" if METHODS[name].reads_text else "served"
        if reason:
            (title,) = (title for title in rows if title.removeprefix("refused: ") in reason)
        found[title].append(name)
    assert {title: ", ".join(sorted(names)) for title, names in found.items()} == rows
    assert len(rows) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_native_class_and_the_common_one(kind: str) -> None:
    config = CASES[kind].config()
    assert architecture_of(config, "transformers") == plugin.TRANSFORMERS
    native = architecture_of(config, "native")
    assert native == plugin.NATIVE[kind] != plugin.TRANSFORMERS
    assert {native, plugin.TRANSFORMERS} < set(plugin.ARCHITECTURES)


def test_a_kind_without_native_class_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"native classes for llava, .* got a 'qwen3_vl' model"):
        architecture_of(CASES["qwen3_vl"].config(), "native")


def test_a_question_goes_with_methods_that_read_one() -> None:
    reads, does_not = Settings("cdpruner", 8), Settings("divprune/dpp", 8)
    assert reads.question("is it red ?") == "is it red ?"
    assert reads.question("") == ""
    assert Settings("cdpruner/maxmin/nearest", 8).question("is it red ?") == "is it red ?"
    assert check_served(parse_method("cdpruner/maxmin"), geometry(CASES["llava"].config())) is None
    assert does_not.question(None) is None
    with pytest.raises(InputError, match=r"cdpruner chooses tokens by the question: send it as .*, got None"):
        reads.question(None)
    with pytest.raises(InputError, match=r"divprune/dpp does not read .*: leave vtprune_question out, got 'x'"):
        does_not.question("x")


def test_a_tower_hears_no_question() -> None:
    class Hears(METHODS["fastervlm"]):
        reads_text = True

    with pytest.raises(PlanError, match="fastervlm reads the prompt"):
        check_served(Hears(), geometry(CASES["llava"].config()))


@torch.no_grad()
def test_each_image_is_chosen_by_its_own_question() -> None:
    """Two images in one run of the tower, against `vtprune.prune` with the question behind each."""
    case = CASES["llava"]
    model, sizes = case.model(), case.sizes[:2]
    root, embed = model.model, model.get_input_embeddings()
    rows = [case.batch(Row((("image", size),), 2, 3 + i, i)) for i, size in enumerate(sizes)]
    pixels = {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}
    words, want = [], []
    for row in rows:
        ids = row["input_ids"][0]
        last = int((ids == model.config.image_token_id).nonzero()[-1])
        words.append(embed(ids[last + 1 :]))
        with vtprune.prune(model, "cdpruner", keep=5) as session:
            model(**row)
            want.append(session.report.kept[-1].indices[0].tolist())
    pruner = ImagePruner(root, Settings("cdpruner", 5))
    with pruner.encoding(pixels, [5, 5], [1, 1]):
        features = torch.cat(list(root.get_image_features(**pixels).pooler_output)).flatten(0, -2).chunk(2)

    def kept(asked: list[torch.Tensor]) -> list[list[int]]:
        return [index.tolist() for _, index in pruner.finish(features, [5, 5], asked)]

    assert kept(words) == want
    assert kept([words[0] * 0, words[1]]) != want
    assert kept([words[0][:0], words[1]])[1] == want[1]
    pruner.remove()


def test_other_families_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="serves the families llava, qwen2_vl, internvl"):
        checked_geometry(CASES["qwen3_vl"].config(), Settings("divprune", 8))


def test_counts_are_those_of_transformers() -> None:
    internvl, qwen = geometry(CASES["internvl"].config()), geometry(CASES["qwen2_vl"].config())
    tile, by_tower, at_input = internvl.visual_tokens, parse_method("fastervlm"), parse_method("divprune")
    assert kept_of_image(by_tower, internvl, 5, 2 * tile) == 5
    assert kept_of_image(by_tower, internvl, 10**6, 2 * tile) == 2 * tile
    assert kept_of_image(by_tower, internvl, 0.5, 3 * tile) == 3 * round(tile / 2)
    # half of 81 is 40.5: a tower's cut rounds up, a solved one goes to the nearest from below
    assert kept_of_image(by_tower, qwen, 0.5, 81) == 41
    assert kept_of_image(at_input, qwen, 0.5, 81) == 40
    with pytest.raises(BudgetError, match="vtprune_keep=2 is less than a token for each of the image's 3 tiles"):
        kept_of_image(by_tower, internvl, 2, 3 * tile)
    with pytest.raises(InputError, match="no multiple of a tile"):
        kept_of_image(by_tower, internvl, 2, tile + 1)


def _cases() -> list[Any]:
    """Every method on every kind; by default all on one, and some on the others."""
    every = [(kind, method) for kind in KINDS for method in (*SERVED, "flowcut(text_cut=False)")]
    short = {(kind, method) for kind in ("qwen2_5_vl", "internvl") for method in ("divprune", "visionzip")}
    fast = {case for case in every if case[0] == "llava"} | short | {("internvl", "uniform")}
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("kind", "method"), _cases())
@torch.no_grad()
def test_images_encoded_together_equal_each_alone_under_prune(kind: str, method: str) -> None:
    """Each image with a budget of its own in one run of the tower, against `vtprune.prune` on a prompt with it."""
    case = CASES[kind]
    model, sizes, budgets = case.model(), case.sizes[:3], (3, 2, 5)
    root = model.model
    batch = case.batch(Row(tuple(("image", size) for size in sizes), 3, 5, 0))
    arguments = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    family = family_of(model.config)(model)
    totals = [medium.tokens for medium in family.media(family.modalities()[0], arguments)][:3]
    parts = [1, 1, 1]
    if kind == "internvl":  # 1, 3 and 2 tiles
        parts, budgets = [1, 3, 2], (3, 7, 4)
        totals = [16 * n for n in parts]
    full = torch.cat(list(root.get_image_features(**arguments).pooler_output)).flatten(0, -2).split(totals)
    pruner = ImagePruner(root, Settings(method, 0.5))
    kept = [min(n, total) for n, total in zip(budgets, totals, strict=True)]
    with pruner.encoding(arguments, kept, parts):
        features = root.get_image_features(**arguments).pooler_output
    rows = torch.cat(list(features)).flatten(0, -2).split(totals)
    pruned = pruner.finish(rows, kept)
    pruner.remove()
    for i, (got, index) in enumerate(pruned):
        alone = case.batch(Row((("image", sizes[i]),), seed=0))
        alone |= _picture(arguments, sum(parts[:i]), parts[i])
        plan = parse_method(method).plan(geometry(model).for_prompt(totals[i], 64, 1), vtprune.budget.Budget(kept[i]))
        if parts[i] > 1 and (plan.at("vision") or method == "random"):
            continue  # transformers takes shares only here (see below), and draws by the prompt
        if method == "random":
            plan = vtprune.Plan((vtprune.plan.Stage(_tower_end(model), parse_method(method), kept[i]),))
        with vtprune.prune(model, plan) as session:
            model(**alone)
            assert index.tolist() == session.report.kept[-1].indices[0].tolist()
        assert got.shape == (kept[i], full[i].shape[-1])
        if method not in ("pool", "prumerge", "prumerge-plus", "tome", "visionzip", "flowcut(text_cut=False)"):
            torch.testing.assert_close(got, full[i][index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tiles_of_a_picture_keep_the_shares_of_transformers() -> None:
    case = CASES["internvl"]
    model, inputs = case.model(), case.batch(Row((("image", 3),), 3, 5, 0))
    kept = kept_of_image(parse_method("fastervlm"), geometry(model), 0.3, 48)
    pruner = ImagePruner(model.model, Settings("fastervlm", 0.3))
    arguments = {"pixel_values": inputs["pixel_values"]}
    with pruner.encoding(arguments, [kept], [3]):
        features = model.model.get_image_features(**arguments).pooler_output
    ((_, index),) = pruner.finish([torch.cat(list(features)).flatten(0, -2)], [kept])
    pruner.remove()
    with vtprune.prune(model, "fastervlm", keep=0.3) as session:
        model(**inputs)
        assert index.tolist() == session.report.kept[-1].indices[0].tolist()


def _picture(arguments: dict[str, torch.Tensor], i: int, tiles: int) -> dict[str, torch.Tensor]:
    grids = arguments.get("image_grid_thw")
    if grids is None:
        return {"pixel_values": arguments["pixel_values"][i : i + tiles]}
    ends = grids.prod(1).cumsum(0).tolist()
    return {
        "pixel_values": arguments["pixel_values"][([0, *ends])[i] : ends[i]],
        "image_grid_thw": grids[i : i + 1],
    }


def _tower_end(model: Any) -> Any:
    return vtprune.plan.Site("vision", geometry(model).vision.feature_block)


def test_a_tower_run_leaves_no_hooks() -> None:
    model = llava()
    before = [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()]
    ImagePruner(model.model, Settings("fastervlm", 4)).remove()
    assert [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in model.modules()] == before


def test_cells_survive_bfloat16() -> None:
    kept = torch.tensor([0, 257, 90_000, 399_999])
    carried = with_cells(torch.randn(4, 8).bfloat16(), kept, 1000)
    rows, cells = without_cells(carried)
    assert rows.shape == (4, 8)
    assert (cells[0] * 1000 + cells[1]).tolist() == kept.tolist()


def test_positions_are_exact_however_the_prompt_is_cut() -> None:
    """Two images of 2 x 3 and 4 x 2 cells, of which 3 and 2 stay; by hand: text 0 1, image from 2, text 5 6, image
    from 7, text 11 12."""
    image, tokens = 9, [1, 1, 9, 9, 9, 1, 1, 9, 9, 1, 1]
    whole, there, moved = restored_prompt(tokens, [Span(2, 3, 6), Span(7, 2, 8)])
    assert whole == [1, 1, *[9] * 6, 1, 1, *[9] * 8, 1, 1]
    assert moved == [Span(2, 6, 6), Span(10, 8, 8)]
    assert [t for t, stays in zip(whole, there, strict=True) if stays] == tokens
    first, second = torch.tensor([1, 3, 5]), torch.tensor([2, 7])
    cells = torch.cat([torch.stack([first // 3, first % 3]), torch.stack([second // 2, second % 2])], 1)
    text = [0, 1, 2, 2, 2, 5, 6, 7, 7, 11, 12]
    want = torch.tensor(
        [
            [0, 1, 2, 2, 2, 5, 6, 7, 7, 11, 12],
            [0, 1, 2, 3, 3, 5, 6, 8, 10, 11, 12],
            [0, 1, 3, 2, 4, 5, 6, 7, 8, 11, 12],
        ]
    )
    visual = torch.tensor(tokens) == image
    start = torch.tensor([text] * 3)
    assert torch.equal(fill_positions(start, visual, 0, cells), want)
    for cut in range(1, len(tokens)):
        behind = int(visual[:cut].sum())
        part = fill_positions(start, visual, 0, cells[:, :behind])
        assert torch.equal(fill_positions(part, visual, cut, cells[:, behind:]), want)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_model_with_wider_heads_says_the_same(kind: str) -> None:
    case = CASES[kind]
    model = case.model()
    wider = widened(model)
    assert wider is not model
    assert wider.config.text_config.head_dim in (32, 64)
    inputs = case.batch(Row((("image", case.sizes[0]),), seed=1), Row((), 2, 9, 2))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(wider(**inputs).logits[real], model(**inputs).logits[real], atol=2e-5, rtol=1e-5)
    assert widened(wider) is wider


def test_a_random_llava_borrows_a_processor(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = export("random:mini", tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(place), AutoProcessor.from_pretrained(place)
    image = Image.new("RGB", (70, 50), "red")
    inputs = processor(text=["what color is <image>"], images=[image], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    assert int(inputs["input_ids"].max()) < model.config.text_config.vocab_size
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_random_model_of_another_kind_has_no_processor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'random:mini-internvl' has no processor, which vLLM needs"):
        export("random:mini-internvl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_server_gets_flags_that_it_can_read() -> None:
    overrides = Settings("visionzip", 0.25).overrides("VTPruneLlavaForConditionalGeneration")
    flags = server_flags("/m", overrides, "me", "127.0.0.1", 8000, 2, "auto")
    given = dict(zip(flags[:-1:2], flags[1::2], strict=True))
    assert json.loads(given["--hf-overrides"]) == {
        "architectures": ["VTPruneLlavaForConditionalGeneration"],
        "vtprune": {"method": "visionzip", "keep": 0.25},
    }
    assert json.loads(given["--limit-mm-per-prompt"]) == {"image": 2}
    assert flags[-1] == "--trust-request-mm-kwargs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "fastv"], "fastv cuts at layer"),
        (["--method", "visionzip", "--keep", "0"], "got '0'"),
        (["--method", "nothing"], "Unknown method 'nothing'"),
        (["--backend", "sglang"], "the backend must be one of native, transformers, got 'sglang'"),
    ],
)
def test_serve_refuses_before_it_starts(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", "tiny:llava", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_serve_says_what_to_install() -> None:
    result = CliRunner().invoke(app, ["serve", "tiny:llava"])
    assert result.exit_code == 2
    assert "needs vLLM 0.32" in " ".join(result.stderr.split())


def test_ratios_are_to_the_full_row_of_the_same_concurrency() -> None:
    rows = [Served(1.0, 1, 2.0, 100.0, 267), Served(16, 1, 3.0, 50.0, 27), Served(1.0, 8, 4.0, 800.0, 267)]
    rows.append(Served(16, 8, 10.0, 200.0, 27))
    assert [found[1:] for found in ratios(rows)] == [(1.0, 1.0), (1.5, 2.0), (1.0, 1.0), (2.5, 4.0)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "tgi"], "--engine must be hf, vllm or vllm-transformers, got 'tgi'"),
        (["--engine", "vllm"], "measures one method"),
        (["--engine", "vllm", "--methods", "uniform,random"], "measures one method"),
        (["--engine", "vllm", "--methods", "fastv", "--model", "tiny:llava"], "inside the decoder"),
    ],
)
def test_bench_refuses_what_vllm_cannot_be_asked(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
