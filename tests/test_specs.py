"""Methods written as text."""

from __future__ import annotations

import pytest

import vtprune
from vtprune.errors import PlanError, UnknownNameError
from vtprune.specs import parse_method, split_methods


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
