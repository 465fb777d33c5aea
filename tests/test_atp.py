"""ATP: closed forms of its scores, masks and losses, and soft masks that say what hard ones say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES
from family_models import Row as FamilyRow
from learned import ready, weights
from models import LAYERS, Row, batch, llava
from oracle import hidden_keys, masked, same_scores
from scorer_views import Sample, attention_view, seen

import vtprune
from vtprune.budget import Budget
from vtprune.errors import CheckpointError, PlanError
from vtprune.predictors import Fingerprint, Thresholds, load_predictor
from vtprune.scorers.atp import ATP, self_attention, spatial_score

SAMPLES = (Sample(((3, 4), (2, 2)), seed=1), Sample(((5, 5),), seed=2, text=9), Sample(((4, 4),), seed=4, gone=(0, 3)))
RAGGED = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2), Row(1, 6, 2, 3))


def fixed(after: list[int], redundancy: float, spatial: float) -> Thresholds:
    """Thresholds that are the same for every prompt."""
    net = Thresholds(Fingerprint("nobody", 8, 4).to_dict(), after=after, width=3)
    for heads, value in ((net.redundancy, redundancy), (net.spatial, spatial)):
        for head in heads:
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.constant_(head.bias, math.log(value / (1 - value)))
    return net


@pytest.mark.parametrize("axis", ["received", "given"])
def test_self_attention_is_the_mean_logit_of_visual_tokens(axis: Any) -> None:
    view = attention_view(SAMPLES)
    got = self_attention(view, axis=axis)
    assert view.every_query is not None
    for b, sample in enumerate(SAMPLES):
        there = view.column[b][view.valid[b]]
        query, key = view.every_query[b][:, there], view.key[b][:, there].repeat_interleave(2, 0)
        logits = (query @ key.transpose(1, 2) * view.scaling).mean(0)  # [queries, keys]
        want = logits.mean(0 if axis == "received" else 1)
        torch.testing.assert_close(got[b][view.valid[b]], want)
        assert not got[b][~view.valid[b]].any(), f"padding of {sample}"
    with pytest.raises(PlanError, match="atp reads the queries of all visual tokens"):
        self_attention(dataclasses.replace(view, every_query=None))


def test_spatial_scores_of_the_ladder() -> None:
    row, col = (t.flatten()[None] for t in torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij"))
    single = spatial_score(row, col, (1 / 4,), 3.0).reshape(7, 7)
    assert single[::2, ::2].unique().tolist() == [0.25]
    assert single.sum() == 0.25 * 16
    ladder = spatial_score(row, col, ATP.rates, 3.0).reshape(7, 7)
    # (0, 0) lies on every grid, (0, 3) on that of 1/9, (0, 4) on that of 1/16, (0, 2) on that of 1/4, (0, 1) on none
    want = [1 - 3 / 36, 0.0, 0.25, 1 - 3 / 9, 1 - 3 / 16, 0.0, 1 - 3 / 36]
    torch.testing.assert_close(ladder[0], torch.tensor(want))
    assert spatial_score(row, col, (1.0,), 3.0).max() == 0.0, "never below 0"


def test_soft_mask_closed_form() -> None:
    view = seen(ready("atp"), (Sample(((2, 2),), seed=1),), (2,))
    scores = torch.tensor([[0.6, 0.1, 0.9, 0.3]])
    view = dataclasses.replace(view, memory={"self": scores, "cross": scores}, row=torch.ones_like(view.row))
    method = ATP(normalise="none")
    soft = method.soft(view, fixed([4, 14, 24], 0.5, 0.999), temperature=10.0)
    assert soft[0, 0].item() == pytest.approx(0.731059, abs=1e-6)
    redundancy, _ = method.parts(view, fixed([4, 14, 24], 0.5, 0.999))
    torch.testing.assert_close(redundancy, scores - 0.5)
    scaled, _ = ATP().parts(view, fixed([4, 14, 24], 0.5, 0.999))
    torch.testing.assert_close(scaled, torch.tensor([[0.125, -0.5, 0.5, -0.25]]))


def test_scores_can_be_scaled_before_they_are_added() -> None:
    view = seen(ready("atp"), (Sample(((2, 2),), seed=1),), (2,))
    # logits of hundreds beside probabilities: their sum only sees the logits
    loud, quiet = torch.tensor([[0.0, 300.0, 100.0, 200.0]]), torch.tensor([[0.9, 0.0, 0.0, 0.3]])
    view = dataclasses.replace(view, memory={"self": loud, "cross": quiet})
    limits = fixed([4, 14, 24], 0.5, 0.999)
    each, _ = ATP(normalise="each").parts(view, limits)
    torch.testing.assert_close(each, torch.tensor([[0.5, 0.5, 1 / 6, 0.5]]) - 0.5)
    both, _ = ATP(normalise="sum").parts(view, limits)
    torch.testing.assert_close(both, torch.tensor([[0.0, 1.0, 1 / 3, 2 / 3]]) - 0.5, atol=3e-3, rtol=0)


def test_weights_bring_the_scores_they_were_trained_with(tmp_path: Path) -> None:
    model = llava()
    trained = {"normalise": "each", "rates": [0.25], "penalty": 2.0}
    Thresholds(Fingerprint.of(model).to_dict(), [1], 2, trained).save_pretrained(tmp_path)
    with vtprune.prune(model, ATP(weights=str(tmp_path))) as session:
        found = session.plan.stages[0].scorer
    assert found == ATP(weights=str(tmp_path), after=(1,), normalise="each", rates=(0.25,), penalty=2.0)
    with pytest.raises(PlanError, match=r"atp penalty is 1\.0, but the weights .* were trained with 2\.0"):
        vtprune.prune(model, ATP(weights=str(tmp_path), penalty=1.0))


def test_hard_masks_are_soft_masks_above_one_half() -> None:
    method = ready("atp")
    assert isinstance(method, ATP)
    net = load_predictor(Thresholds, str(method.weights))
    for limits in (net, fixed([4, 14, 24], 0.3, 0.7), fixed([4, 14, 24], 0.9, 0.2)):
        view = seen(method, SAMPLES, (1, 1, 1))
        soft = method.soft(view, limits)
        above = torch.maximum(*method.parts(view, limits)) > 0
        assert torch.equal(soft > 0.5, above & view.valid)
        assert 0 < int((soft > 0.5).sum()) < int(view.valid.sum())


def test_a_token_stays_if_it_is_above_one_of_the_thresholds() -> None:
    method = ready("atp")
    assert isinstance(method, ATP)
    view = seen(method, SAMPLES, (1, 1, 1))
    counts = method.count(view)
    kept = method.select(dataclasses.replace(view, keep=counts))
    redundancy, spatial = method.parts(view, load_predictor(Thresholds, str(method.weights)))
    assert torch.equal(kept, ((redundancy > 0) | (spatial > 0)) & view.valid)
    assert torch.equal(kept.sum(1), counts)


@torch.no_grad()
def test_decides_by_itself_knows_no_batch_mates_and_is_exact() -> None:
    model = llava()
    method = ready("atp", model)
    rows = tuple(Row(1 + seed % 2, 3, 5 + seed % 3, seed) for seed in range(6))
    inputs = batch(*rows)
    greedy = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with vtprune.prune(model, method) as session:
        out, report = model.generate(**inputs, **greedy), session.report
        assert len({tokens[1] / tokens[0] for tokens in report.tokens_per_layer}) > 1, "all samples kept alike"
        for b, row in enumerate(rows):
            alone = model.generate(**batch(row), **greedy)
            assert session.report.tokens_per_layer == (report.tokens_per_layer[b],)
            assert torch.equal(out.sequences[b, -8:], alone.sequences[0, -8:])
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model.generate(**inputs, **greedy)
    same_scores(out, want)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "llava_next"])
def test_is_exact_on_families(name: str) -> None:
    case = CASES[name]
    model = case.model()
    inputs = case.batch(
        FamilyRow((("image", case.sizes[0]),), 3, 5, 0), FamilyRow((("image", case.sizes[1]),), 4, 9, 1)
    )
    result = vtprune.verify(model, inputs, ready("atp", model))
    assert result.exact
    assert any(t[-1] < t[0] for t in result.report.tokens_per_layer)


def test_modules_sit_where_the_weights_say() -> None:
    model = llava()
    shape = Fingerprint.of(model)
    folder = weights("atp", shape)
    with vtprune.prune(model, ATP(weights=folder)) as session:
        assert [str(stage.site) for stage in session.plan.stages] == ["layer[1]", "layer[2]", "layer[3]"]
    with pytest.raises(PlanError, match=r"atp after is \(1,\), but the weights .* were trained with \(0, 1, 2\)"):
        vtprune.prune(model, ATP(weights=folder, after=(1,)))
    with pytest.raises(PlanError, match=r"atp after must lie in \[0, 2\] \(4 decoder layers\), got \(3,\)"):
        ATP(after=(3,)).plan(vtprune.geometry(model), Budget(None))
    with pytest.raises(CheckpointError, match="holds weights of 'dyvte', expected those of 'atp'"):
        vtprune.prune(model, ATP(weights=weights("dyvte", shape)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"after": (3, 2)}, "after must be increasing"),
        ({"axis": "both"}, "axis must be 'received' or 'given'"),
        ({"normalise": True}, "normalise must be 'sum', 'each' or 'none'"),
        ({"rates": (0.3,)}, "rates must be shares 1 / n"),
        ({"rates": ()}, "rates must be shares 1 / n"),
        ({"penalty": -1}, "penalty must be a number >= 0"),
    ],
)
def test_knobs_are_checked(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"atp {message}"):
        ATP(**knobs)
