"""Sites, plans as JSON, budgets and the solver."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from models import TOKENS, Row, batch, config, llava

import vtprune
from vtprune.budget import Budget, Geometry, parse_keep, scale_depth
from vtprune.cost import plan_cost
from vtprune.errors import PlanError, UnknownNameError
from vtprune.plan import Plan, Site, Stage, resolve_count


def big() -> Geometry:
    """LLaVA-1.5-7B's decoder."""
    return Geometry("llava", 32, 4096, 32, 32, 128, 11008, 576)


@pytest.mark.parametrize("text", ["vision[3]", "input", "restart[0]", "restart[5]", "layer[2]"])
def test_sites_read_what_they_write(text: str) -> None:
    assert str(Site.parse(text)) == text


@pytest.mark.parametrize("text", ["layer", "layer[-1]", "vision[x]", "restart", "restart(3)", ""])
def test_bad_sites(text: str) -> None:
    with pytest.raises(PlanError, match="got"):
        Site.parse(text)


def test_layer_zero_is_the_input() -> None:
    with pytest.raises(PlanError, match=r"layer\[0\] is the site 'input'"):
        Site("layer", 0)


@pytest.mark.parametrize(
    "sites",
    [
        ("layer[3]", "layer[1]"),
        ("layer[1]", "restart[2]"),
        ("restart[2]", "restart[1]"),
        ("restart[2]", "restart[2]"),
        ("restart[0]", "input"),
        ("input", "vision[1]"),
    ],
)
def test_stages_go_forward(sites: tuple[str, str]) -> None:
    first, second = (Stage(Site.parse(site), vtprune.GemFilter(), 3) for site in sites)
    message = f"must go forward through the model, got {second.site} (gemfilter) after {first.site} (gemfilter)"
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan((first, second))
    if sites[0] != sites[1]:
        assert len(Plan((second, first)).stages) == 2


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = Plan(
        (
            Stage(Site("vision", 2), vtprune.FlowCut(history=0.25, remaining=2), 0.5, adaptive=True),
            Stage(Site("input"), vtprune.DivPrune(), 7, positions="compact"),
            Stage(Site("layer", 2), vtprune.FastV(layer=2), 3),
        )
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["stages"][2]["site"] == "layer[2]"
    assert plan != Plan(plan.stages[:2])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", PlanError, "is not JSON"),
        ("[]", PlanError, "holds a list"),
        ("{}", PlanError, "not a plan"),
        ('{"vtprune_plan": 2, "stages": []}', PlanError, "not a plan"),
        ('{"vtprune_plan": 1, "stages": [{"site": "input"}]}', PlanError, r"got \['site'\]"),
        (
            '{"vtprune_plan": 1, "stages": [{"site": "input", "keep": 3, "scorer": {"name": "unifrm"}}]}',
            UnknownNameError,
            "Did you mean 'uniform'",
        ),
        (
            '{"vtprune_plan": 1, "stages": [{"site": "input", "keep": 3, "scorer": {"name": "fastv", "depth": 2}}]}',
            PlanError,
            r"got \['depth'\]",
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(error, match=message):
        Plan.load(tmp_path / "plan.json")


def test_saved_plan_runs_like_the_method(tmp_path: Path) -> None:
    model, inputs = llava(), batch(Row())
    with vtprune.prune(model, ["flowcut", "fastv"], [0.6, 0.4]) as session:
        want, kept = model(**inputs).logits, session.report.kept
        session.plan.save(tmp_path / "plan.json")
    with vtprune.prune(model, Plan.load(tmp_path / "plan.json")) as session:
        assert (model(**inputs).logits == want).all()
        for a, b in zip(kept, session.report.kept, strict=True):
            assert (a.site, a.indices[0].tolist()) == (b.site, b.indices[0].tolist())


@pytest.mark.parametrize(
    ("keep", "total", "want"),
    [
        (0.1, 10, 1),
        (1 / 9, 256, 28),
        (1 / 16, 256, 16),
        (0.5, 3, 2),
        (0.001, 16, 1),
        (1.0, 7, 7),
        (7, 7, 7),
        (0.3, 0, 0),
        (5, 0, 0),
    ],
)
def test_counts_round_half_up_and_never_to_zero(keep: float, total: int, want: int) -> None:
    assert resolve_count(keep, total) == want


@pytest.mark.parametrize(
    ("text", "want"), [("25%", 0.25), ("64", 64), ("0.25", 0.25), ("1/9", 1 / 9), (" 1 ", 1), ("1.0", 1.0), (12, 12)]
)
def test_budgets_as_text(text: str | int, want: float) -> None:
    value = parse_keep(text)
    assert (value, type(value)) == (want, type(want))


def test_scale_depth() -> None:
    assert scale_depth((7, 9, 12), 32, 32) == (7, 9, 12)
    assert scale_depth((2,), 32, 12) == (1,)
    assert scale_depth((7, 9, 12), 32, 12) == (3, 4, 5)
    assert scale_depth((1, 2, 3), 32, 8) == (1, 2, 3)
    assert max(scale_depth((7, 9, 12), 32, 4)) == 3


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_counts_that_the_field_uses(average: int, kept: int) -> None:
    """K=2 of 32 layers: 166 / 98 / 30 tokens give averages of 192 / 128 / 64 within half a token."""
    plan = vtprune.FastV().plan(big(), Budget(average))
    assert str(plan.stages[0].site) == "layer[2]"
    tokens = plan.tokens_per_layer(big().entering, 576)
    assert abs(sum(tokens) / 32 - average) <= 0.5
    assert plan.stages[0].count(576) == pytest.approx(kept, abs=1)


def test_bases() -> None:
    shape = big()
    average = vtprune.FastV().plan(shape, Budget(0.25))
    final = vtprune.FastV().plan(shape, Budget(0.25, "final"))
    assert final.stages[0].count(576) == 144 > average.stages[0].count(576)
    share = vtprune.FastV().plan(shape, Budget(0.4, "flops"))
    assert plan_cost(share, shape, "flops") == pytest.approx(0.4, abs=0.001)
    cut = vtprune.FlowCut().plan(vtprune.geometry(config()), Budget(0.9, "flops"))
    assert plan_cost(cut, vtprune.geometry(config()), "flops") == pytest.approx(0.9, abs=0.02)


def test_composition_counts_what_earlier_methods_leave() -> None:
    shape = big()
    first = vtprune.Uniform().plan(shape, Budget(288))
    both = first + vtprune.FastV().plan(shape.after(first), Budget(64))
    tokens = both.tokens_per_layer(shape.entering, 576)
    assert tokens[:2] == (288, 288)
    assert tokens[2] < 64
    assert abs(sum(tokens) / 32 - 64) <= 0.5


def test_flops_budget_follows_each_prompt() -> None:
    """The share is of that prompt's own prefill, so a longer text leaves room for fewer visual tokens."""
    model = llava()
    with vtprune.prune(model, "uniform", flops=0.6) as session:
        model(**batch(Row(1, 3, 5)))
        short = session.report
        model(**batch(Row(1, 3, 12)))
        long = session.report
    assert long.average_tokens[0] < short.average_tokens[0]
    for report in (short, long):
        assert report.flops / report.flops_full == pytest.approx(0.6, abs=0.03)
    assert short.visual_tokens == (TOKENS,)


@pytest.mark.parametrize("counts", [(12, 8, 6, 3), (12, 12, 6, 6), (16, 8, 8, 3), (12, 14, 13, 5)])
def test_planned_cost_is_the_reported_one(counts: tuple[int, ...]) -> None:
    """A pass that is broken off and layers that are asked count with the tokens that reach them, if they drop any."""
    asks = vtprune.TransPrune(layers=(1, 3), ratios=(0.6, 0.3), since=0)
    sites = {"input": vtprune.Uniform(), "restart[2]": vtprune.GemFilter(layer=2), "layer[1]": asks, "layer[3]": asks}
    stages = zip(sites.items(), counts, strict=True)
    plan = Plan(tuple(Stage(Site.parse(site), scorer, count) for (site, scorer), count in stages))
    model = llava()
    with vtprune.prune(model, plan) as session:
        model(**batch(Row()))
        report = session.report
    shape = vtprune.geometry(model).for_prompt(TOKENS, report.text_tokens[0], 1)
    assert report.flops / report.flops_full == pytest.approx(plan_cost(plan, shape, "flops"), rel=1e-9)
    assert report.average_tokens == (plan_cost(plan, shape, "average"),)
    assert report.tokens_per_layer[0][-1] == plan_cost(plan, shape, "final")
    # as a later method sees it
    first, rest = Plan(plan.stages[:1]), Plan(plan.stages[1:])
    assert plan_cost(rest, shape.after(first), "flops") == plan_cost(plan, shape, "flops")
