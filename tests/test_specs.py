"""Methods written as text."""

from __future__ import annotations

from pathlib import Path

import models
import pytest

import vtprune
from vtprune.errors import BudgetError, InputError, PlanError, UnknownNameError
from vtprune.specs import parse_chain, parse_method, row_chain, split_methods, sweep_methods, with_seed


def test_separators_inside_brackets_do_not_split() -> None:
    assert split_methods("fastv, gemfilter(layer=3, pool=3),,transprune(layers=(1, 2, 3))") == [
        "fastv",
        "gemfilter(layer=3, pool=3)",
        "transprune(layers=(1, 2, 3))",
    ]
    assert split_methods("uniform+fastv(layer=1+1)", "+") == ["uniform", "fastv(layer=1+1)"]
    assert split_methods(" ") == []


def test_names_and_knobs() -> None:
    assert parse_method("fastv") == vtprune.FastV()
    assert parse_method(" fastv() ") == vtprune.FastV()
    method = parse_method("transprune(layers=(2, 4, 6), signals='iga', alpha=0.25, since=None)")
    assert method == vtprune.TransPrune(layers=(2, 4, 6), signals="iga", alpha=0.25)


@pytest.mark.parametrize(
    "text",
    [
        "fastv(",
        "fastv(3)",
        "fastv(layer)",
        "fastv(layer=open(1))",
        "fastv(layer=3) + 1",
        "fastv(**{})",
        "fastv(layer=3))",
    ],
)
def test_what_is_not_a_name_with_knobs_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"a method is written 'name' or 'name\(knob=value, ...\)'"):
        parse_method(text)


def test_unknown_names_and_knobs() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'fastv'"):
        parse_method("fastw(layer=2)")
    with pytest.raises(PlanError, match=r"fastv has the knobs .* got \['depth'\]"):
        parse_method("fastv(depth=2)")
    with pytest.raises(PlanError, match="fastv layer must be an int >= 1"):
        parse_method("fastv(layer=0)")


# chains


def test_members_and_their_budgets() -> None:
    chain = parse_chain("flowcut@1/2 + transprune(layers=(5,+6,8))")
    assert chain.methods == (vtprune.FlowCut(), vtprune.TransPrune(layers=(5, 6, 8)))
    assert chain.fixed == (0.5, None)
    tokens, share, rest = parse_chain("uniform@64+random@25%+fastv").fixed
    assert (tokens, type(tokens), share, rest) == (64, int, 0.25, None)
    assert parse_chain("fastv").fixed == (None,)


def test_fixed_budgets_stay_and_the_given_ones_fill_the_gaps() -> None:
    assert parse_chain("uniform@1/2+fastv").keeps(0.25) == [0.5, 0.25]
    assert parse_chain("uniform@1/2+random+fastv").keeps([64, 0.25]) == [0.5, 64, 0.25]
    assert parse_chain("uniform@1/2+fastv@8").keeps(None) == [0.5, 8]
    # nothing fixed: as prune() reads it
    assert parse_chain("uniform+fastv").keeps([288, 64]) == [288, 64]
    assert parse_chain("fastv").keeps("25%") == "25%"


@pytest.mark.parametrize(
    ("text", "keep", "count"),
    [("uniform@1/2+fastv@8", 0.25, "0 of the 2"), ("uniform@1/2+fastv", [0.5, 0.25], "1 of the 2")],
)
def test_budgets_that_no_member_takes_are_refused(text: str, keep: object, count: str) -> None:
    with pytest.raises(
        BudgetError, match=f"{count} methods in '{text}' take a budget and have no @keep".replace("+", r"\+")
    ) as caught:
        parse_chain(text).keeps(keep)
    assert str(caught.value).endswith(f"got keep={keep!r}.")


@pytest.mark.parametrize("text", ["", "+fastv", "uniform++fastv", "@1/2+fastv", "uniform@1/2@1/4+fastv"])
def test_what_is_not_a_chain_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"a chain is written 'method\+method' or 'method@keep\+method', got"):
        parse_chain(text)


@pytest.mark.parametrize("text", ["uniform@+fastv", "uniform@3/2+fastv", "uniform@1/2(seed=1)+fastv"])
def test_a_bad_budget_names_its_member(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_chain(text)
    assert str(caught.value).startswith(f"behind the @ of {text.removesuffix('+fastv')!r}: keep must be ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("uniform+fastv(layer=2)", "2 of 'uniform', 'fastv(layer=2)'"),
        ("uniform@1/2", "0 of 'uniform@1/2'"),
        ("uniform@1/2+fastv@1/4", "0 of 'uniform@1/2', 'fastv@1/4'"),
    ],
)
def test_a_row_has_one_budget(text: str, found: str) -> None:
    with pytest.raises(BudgetError, match="exactly one method of a chain takes the row's budget") as caught:
        row_chain(text)
    assert str(caught.value).endswith(f"got {text!r}, where {found} have none.")


def test_methods_of_a_sweep() -> None:
    names = sweep_methods("gemfilter(layer=3),all,flowcut@1/2+fastv")
    assert names == ("gemfilter(layer=3)", *vtprune.methods(), "flowcut@1/2+fastv")
    with pytest.raises(InputError, match=r"at least one method, got ' , '\. Legal: all, atp, cdpruner, dart, divprune"):
        sweep_methods(" , ")


@pytest.mark.parametrize("basis", ["average", "final"])
def test_a_chain_is_the_list_of_its_methods(basis: str) -> None:
    for keep in (0.25, 5):
        with vtprune.prune(models.llava(), "uniform@1/2+fastv(layer=2)", keep, basis=basis) as session:
            text = session.plan
        with vtprune.prune(models.llava(), ["uniform", "fastv(layer=2)"], [0.5, keep], basis=basis) as session:
            assert session.plan == text
    assert [stage.scorer.name for stage in text.stages] == ["uniform", "fastv"]


def test_a_chain_says_what_it_cannot_reach() -> None:
    with pytest.raises(BudgetError, match=r"in the chain uniform@0\.5\+fastv@1: fastv cannot reach 1 of 16") as caught:
        vtprune.prune(models.llava(), "uniform@1/2+fastv(layer=2)", 1)
    # two layers see 8 tokens, two see 1
    assert caught.value.floor == 4.5
    assert "Ask for 4.5 or more" in str(caught.value)


def test_a_chain_keeps_no_more_than_its_fixed_part() -> None:
    model = models.llava()
    for keep in (0.5, 0.75, 1.0):
        with vtprune.prune(model, "uniform@1/2+fastv(layer=2)", keep) as session:
            model(**models.batch(models.Row()))
            assert session.report.average_tokens == (models.TOKENS / 2,)


# saved plans


def test_a_text_that_ends_in_json_is_a_saved_plan(tmp_path: Path) -> None:
    model = models.llava()
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", 2), vtprune.FastV(), 0.25),))
    path = tmp_path / "plan.json"
    plan.save(path)
    chain = row_chain(str(path))
    assert (chain.plan, chain.methods, chain.decides) == (plan, (), True)
    with vtprune.prune(model, str(path)) as session:
        assert session.plan == plan
    with pytest.raises(BudgetError, match=r"a Plan carries its own counts; leave out keep=0\.5"):
        vtprune.prune(model, str(path), keep=0.5)
    with pytest.raises(InputError, match=r"there is no plan file 'gone\.json'"):
        vtprune.prune(model, "gone.json")
    deep = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", 30), vtprune.FastV(), 0.25),))
    deep.save(path)
    with pytest.raises(PlanError, match=r"layer\[30\] is outside the decoder, which has layers 0 to"):
        vtprune.prune(model, str(path))


@pytest.mark.parametrize(
    ("text", "seeded"),
    [
        ("random", "random(seed=3)"),
        ("flowcut@1/2+random", "flowcut@1/2+random(seed=3)"),
        ("random@1/2+fastv(layer=2)", "random(seed=3)@1/2+fastv(layer=2)"),
        # what the user set stays
        ("random(seed=7)", "random(seed=7)"),
        ("fastv", "fastv"),
        ("fastv(positions='compact')@64+pool", "fastv(positions='compact')@64+pool"),
    ],
)
def test_methods_that_draw_take_a_seed(text: str, seeded: str) -> None:
    assert with_seed(text, 3) == seeded
    assert [type(m) for m in parse_chain(seeded).methods] == [type(m) for m in parse_chain(text).methods]
    assert parse_chain(seeded).fixed == parse_chain(text).fixed
