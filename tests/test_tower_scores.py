"""Scores of tower stages in the report: those that chose, or none at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from family_models import CASES, Case
from tower_cases import NAMES, ragged

import vtprune
from vtprune.hooks.tower_scores import StageScores, TowerScores, with_tower_scores
from vtprune.plan import Site
from vtprune.report import Kept

# the host lays row ends between the tower's outputs, or sorts them once more (windows)
REARRANGED = {"llava_next", "llava_next_video", "llava_onevision", "qwen2_5_vl"}
TOWER = vtprune.FlowCut(text_cut=False)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@torch.no_grad()
def test_recorded_scores_are_those_that_chose(case: Case) -> None:
    rows = ragged(case)
    model, inputs = case.model(), case.batch(*rows)
    with vtprune.prune(model, TOWER, 0.5, record_scores=True) as session:
        model(**inputs)
        report, layout = session.report, session.report.layout
    towers = [kept for kept in report.kept if kept.site.kind == "vision"]
    scored = [kept for kept in towers if kept.scores is not None]
    if case.name in REARRANGED:
        assert not scored
        return
    assert scored
    compared = 0
    for kept in scored:
        for sample, (indices, values, alive) in enumerate(zip(kept.indices, kept.scores, kept.alive, strict=True)):
            assert len(values) == len(alive)
            # of each image, crop or frame the best ones stayed
            grids, stayed = layout.grid[sample][alive], torch.isin(alive, indices)
            for grid in grids.unique():
                inside, outside = values[(grids == grid) & stayed], values[(grids == grid) & ~stayed]
                if len(inside) and len(outside):
                    compared += 1
                    assert inside.min() >= outside.max()
    assert compared
    # every token that a stage scored was left by the one before it
    for before, after in itertools.pairwise(towers):
        if after.alive is not None:
            assert all(torch.equal(a, b) for a, b in zip(after.alive, before.indices, strict=True))


@torch.no_grad()
def test_nothing_is_recorded_unless_it_was_asked_for() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(*ragged(case))
    with vtprune.prune(model, TOWER, 0.5) as session:
        model(**inputs)
        assert all(kept.scores is None for kept in session.report.kept)


@torch.no_grad()
def test_beams_take_no_scores_from_elsewhere() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(ragged(case)[0])
    with vtprune.prune(model, TOWER, 0.5, record_scores=True) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        beams = session.report
        model(**inputs)
        alone = session.report
    assert len(beams.visual_tokens) == 2
    assert all(kept.scores is None for kept in beams.kept)
    assert any(kept.scores is not None for kept in alone.kept)


def _kept(*indices: list[int]) -> Kept:
    return Kept(Site("vision", 2), tuple(torch.tensor(one, dtype=torch.long) for one in indices))


def _read(kept: list[int], total: int = 7) -> TowerScores:
    return TowerScores(total, {1: StageScores(torch.arange(total), torch.arange(total) / 10, torch.tensor(kept))})


def test_scores_go_to_the_samples_their_rows_belong_to() -> None:
    # samples of 4, 0 and 3 tokens
    (scored,) = with_tower_scores([_kept([1, 3], [], [0])], (4, 0, 3), _read([1, 3, 4]))
    assert [one.tolist() for one in scored.alive] == [[0, 1, 2, 3], [], [0, 1, 2]]
    flat = [value for one in scored.scores for value in one.tolist()]
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(flat, [n / 10 for n in range(7)], strict=True))


@pytest.mark.parametrize(
    "read",
    [None, _read([1, 3, 5]), _read([1, 3, 4], total=8), TowerScores(7)],
    ids=["none", "others", "more", "stages"],
)
def test_scores_that_may_be_others_are_left_out(read: TowerScores | None) -> None:
    (kept,) = with_tower_scores([_kept([1, 3], [], [0])], (4, 0, 3), read)
    assert kept.scores is None
    assert kept.alive is None
