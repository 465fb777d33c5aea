"""The table of all methods names every registered one, with its paper and the places where it cuts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from learned import ready
from scorer_views import LLAVA

from vtprune.budget import Budget
from vtprune.contract import METHODS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods" / "field.md"
ROWS = {
    cells[0].strip(" `"): [cell.strip() for cell in cells[1:]]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
    for cells in [line.strip("|").split("|")]
}
WORDS = {"vision": "tower", "input": "input", "layer": "layer", "restart": "restart"}


def test_every_method_has_one_row() -> None:
    assert list(ROWS) == sorted(METHODS)
    assert {len(cells) for cells in ROWS.values()} == {5}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_row_tells_paper_and_place(name: str) -> None:
    paper, cuts, *_ = ROWS[name]
    named = re.findall(r"arXiv (\d{4}\.\d{5})|, (\d{4}\.\d{5})", METHODS[name].summary)
    numbers = [number for pair in named for number in pair if number]
    assert set(re.findall(r"\d{4}\.\d{5}", paper)) == set(numbers)
    assert numbers or paper in ("baseline", "baseline for videos", "NeurIPS 2025")
    # FlowCut has a cut in the decoder only where images are cut up into crops
    crops = dataclasses.replace(LLAVA, family="llava_next", dynamic=True, visual_tokens=2880, entering=())
    method = ready(name)
    # all tokens: EVS keeps images whole
    budget = Budget(1.0 if method.takes_budget else None)
    sites = {stage.site.kind for shape in (LLAVA, crops) for stage in method.plan(shape, budget).stages}
    assert {kind for kind, word in WORDS.items() if re.search(rf"\b{word}", cuts)} == sites
