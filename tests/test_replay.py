"""Recorded sets: the same tokens, logits and decode steps again, and what cannot be replayed is refused."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

import vtprune
from vtprune.contract import METHODS
from vtprune.errors import PlanError, UnknownNameError
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.replay import Replay

ROWS = (models.Row(), models.Row(before=5, after=2))


def run(method: Any, keep: Any = None, rows: tuple[models.Row, ...] = ROWS) -> tuple[Any, Any, Any]:
    """(logits, greedy ids, report) of a pruned batch."""
    model, inputs = models.llava(), models.batch(*rows)
    with vtprune.prune(model, method, keep) as session, torch.no_grad():
        logits = model(**inputs).logits
        report, plan = session.report, session.plan
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return logits, ids, (plan, report)


@pytest.mark.parametrize(
    ("method", "keep"),
    [
        ("random", 5),
        ("fastv", 0.5),
        (["random", "fastv"], [10, 6]),
        ("flowcut", 8),
        ("transprune(layers=(1, 2, 3))", 12),
    ],
)
def test_the_same_tokens_give_the_same_logits(method: Any, keep: Any) -> None:
    logits, ids, (plan, report) = run(method, keep)
    again, same_ids, (replayed, its) = run(vtprune.replay(plan, report.kept))
    assert all(isinstance(stage.scorer, Replay) for stage in replayed.stages)
    assert [str(s.site) for s in replayed.stages] == [str(s.site) for s in plan.stages]
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    assert torch.equal(same_ids, ids)
    assert its.tokens_per_layer == report.tokens_per_layer
    # other sets give other logits, so the above says something
    wrong = [{"site": str(k.site), "indices": [list(range(len(i))) for i in k.indices]} for k in report.kept]
    assert not torch.equal(run(vtprune.replay(plan, wrong))[0], logits)


def test_sets_of_different_sizes_are_replayed_in_a_batch() -> None:
    plan = Plan((Stage(Site("input"), vtprune.Random(), 8), Stage(Site("layer", 2), vtprune.FastV(), 4)))  # type: ignore[attr-defined]
    sets: list[dict[str, Any]] = [
        {"site": "input", "indices": [[0, 3, 7], [1, 2, 3, 4, 15]]},
        {"site": "layer[2]", "indices": [[3], []]},
    ]
    _, ids, (replayed, report) = run(vtprune.replay(plan, sets))
    assert report.tokens_per_layer == ((3, 3, 1, 1), (5, 5, 0, 0))
    for place, row in enumerate(ROWS):
        alone = [{**record, "indices": [record["indices"][place]]} for record in sets]
        model, inputs = models.llava(), models.batch(row)
        with vtprune.prune(model, vtprune.replay(plan, alone)):
            its = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(its[0, -5:], ids[place, -5:])
    assert Plan.from_dict(replayed.to_dict()) == replayed


def test_beams_share_the_set_of_their_prompt() -> None:
    _, _, (plan, report) = run("random", 5)
    model, inputs = models.llava(), models.batch(*ROWS)
    beams: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with vtprune.prune(model, "random", 5) as session:
        expected = model.generate(**inputs, **beams)
        sets = [indices.tolist() for indices in session.report.kept[0].indices]
    with vtprune.prune(model, vtprune.replay(plan, report.kept)) as session:
        assert torch.equal(model.generate(**inputs, **beams), expected)
        assert [indices.tolist() for indices in session.report.kept[0].indices] == sets
    assert sets[0] == sets[2] != sets[3] == sets[5]


def test_a_restart_goes_in_with_its_survivors() -> None:
    logits, _, (plan, report) = run("gemfilter(layer=1)", 10)
    assert plan.stages[0].site.kind == "restart"
    again, _, (replayed, its) = run(vtprune.replay(plan, report.kept))
    assert [str(stage.site) for stage in replayed.stages] == ["input"]
    assert its.flops < report.flops
    torch.testing.assert_close(again[:, -1], logits[:, -1], rtol=0, atol=1e-5)


def test_what_cannot_be_replayed_is_refused() -> None:
    _, _, (plan, report) = run("random", 5)
    with pytest.raises(PlanError, match="1 stages, but 0 are recorded"):
        vtprune.replay(plan, [])
    with pytest.raises(PlanError, match=r"recorded at layer\[2\] does not belong to the plan's stage at input"):
        vtprune.replay(plan, [{"site": "layer[2]", "indices": [[0], [0]]}])
    pooled = run("pool", 4)[2]
    with pytest.raises(PlanError, match="pool merges tokens at input"):
        vtprune.replay(pooled[0], pooled[1].kept)
    either = run("gemfilter(layer=1, tokens='any')", 10)[2]
    with pytest.raises(PlanError, match=r"gemfilter also drops text at restart\[1\]"):
        vtprune.replay(either[0], either[1].kept)
    with pytest.raises(PlanError, match="sets of 2 samples were recorded, but input sees 1"):
        run(vtprune.replay(plan, report.kept), rows=ROWS[:1])
    missing = [{"site": "input", "indices": [[0, 99], [1]]}]
    with pytest.raises(PlanError, match="2 tokens of sample 0 were recorded at input, but only 1 of them are there"):
        run(vtprune.replay(plan, missing))
    with pytest.raises(PlanError, match=r"use vtprune\.replay"):
        vtprune.prune(models.llava(), "replay", 0.5)


def test_it_is_not_listed_but_plans_that_hold_it_load() -> None:
    assert "replay" not in vtprune.methods()
    assert METHODS["replay"] is Replay
    with pytest.raises(UnknownNameError) as caught:
        METHODS["replays"]
    assert "replay," not in str(caught.value)
