"""SparseVLM: raters by hand, the authors' counts, and what the raters attend to on a model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import IMAGE, LAYERS, Row, batch, llava
from oracle import hidden_keys, masked
from scorer_views import LLAVA, WIDTH, Sample, token_view
from test_pyramids import watching
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import BudgetError, InputError, PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.sparsevlm import SparseVLM
from vtprune.views import TextView

ROWS = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(1, 6, 2, 3))


def axes(*values: float) -> Tensor:
    """[1, n, WIDTH] multiples of the first unit vectors."""
    states = torch.zeros(1, len(values), WIDTH)
    for i, value in enumerate(values):
        states[0, i, i] = value
    return states


def test_raters_by_hand() -> None:
    view = token_view([Sample(((1, 3),), text=5)], [2])
    words = torch.cat([axes(9.0, 0.0), axes(0.0, 1.0), axes(2.0)], 1)
    behind = torch.tensor([[False, True, True, True, True]])
    view = dataclasses.replace(
        view, hidden=axes(1.0, 3.0, 1.0), text=TextView(words, torch.ones(1, 5, dtype=torch.bool), behind)
    )
    # behind the image are 0, 0, e_2 and 2 e_1. Products with e_1: 0 0 0 2, shares 1 1 1 e^2 of 3 + e^2; with 3 e_2:
    # 0 0 3 0, shares 1 1 e^3 1 of 3 + e^3; with e_3 all 1/4. The last two are above the mean of 1/4:
    shares = [[1, 1, 1, math.e**2], [1, 1, math.e**3, 1], [1, 1, 1, 1]]
    mean = [sum(row[t] / sum(row) for row in shares) / 3 for t in range(4)]
    assert [m > 0.25 for m in mean] == [False, False, True, True]
    assert SparseVLM().prepare(view)["raters"][0].tolist() == [[0, 0, 1, 1]] * 3
    # words that all concern it alike all rate
    flat = dataclasses.replace(view, text=dataclasses.replace(view.text, hidden=torch.ones_like(words)))
    assert SparseVLM().prepare(flat)["raters"][0].tolist() == [[1, 1, 1, 1]] * 3
    with pytest.raises(PlanError, match="sparsevlm reads the prompt's text"):
        SparseVLM().prepare(dataclasses.replace(view, text=None))


@pytest.mark.parametrize(
    ("average", "counts"), [(202.75, [300, 200, 110]), (140.8125, [303, 110, 36]), (79.1875, [66, 30, 17])]
)
def test_the_authors_counts(average: float, counts: list[int]) -> None:
    plan = SparseVLM().plan(LLAVA, Budget(math.floor(average + 0.5)))
    assert [s.site for s in plan.stages] == [Site("layer", 3), Site("layer", 7), Site("layer", 16)]
    found = [s.count(576) for s in plan.stages]
    assert all(abs(a - b) <= 3 for a, b in zip(found, counts, strict=True))
    exact = (3 * 576 + 4 * counts[0] + 9 * counts[1] + 16 * counts[2]) / 32
    assert exact == average
    assert Plan.from_dict(plan.to_dict()) == plan


def test_more_budget_is_never_fewer_tokens() -> None:
    costs = []
    for keep in range(56, 577, 20):
        plan = SparseVLM().plan(LLAVA, Budget(keep))
        costs.append(sum(plan.tokens_per_layer((576,) * 32, 576)) / 32)
        assert abs(costs[-1] - keep) <= 1
        counts = [s.count(576) for s in plan.stages]
        assert counts == sorted(counts, reverse=True)
    assert costs == sorted(costs)
    with pytest.raises(BudgetError, match="sparsevlm cannot reach 40 of 576"):
        SparseVLM().plan(LLAVA, Budget(40))


@torch.no_grad()
def test_it_keeps_what_the_raters_attend_to() -> None:
    """Attention of the unpruned model, in which what left earlier is hidden, behind each layer."""
    model, inputs = llava(), batch(*ROWS)
    with vtprune.prune(model, SparseVLM(layers=(0, 1, 2), recycle=False), 0.7) as session:
        model(**inputs)
        report = session.report
    assert [str(r.site) for r in report.kept] == ["layer[1]", "layer[2]", "layer[3]"]
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    seen, handles = watching(model)
    with masked(model, hidden):
        model(**inputs)
    for handle in handles:
        handle.remove()
    features = list(model.get_image_features(inputs["pixel_values"]).pooler_output)
    table = model.get_input_embeddings().weight
    dropped = 0
    for b, row in enumerate(ROWS):
        visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0]
        first = int(visual.max()) + 1
        states, features = torch.cat(features[: row.images]), features[row.images :]
        share = (states @ table[inputs["input_ids"][b, first:]].T).softmax(1).mean(0)
        raters = [first + t for t in range(len(share)) if share[t] > share.mean()]
        assert 0 < len(raters) < len(share)
        for record in report.kept:
            layer = record.site.index - 1
            query, key = seen[layer]
            total = torch.zeros(key.shape[2])
            for rater in raters:
                there = inputs["attention_mask"][b].bool() & ~hidden[layer][b]
                there &= torch.arange(len(there)) <= rater
                logits = (query[b, :, rater, None] * key[b]).sum(-1) / math.sqrt(key.shape[-1])
                total += logits.masked_fill(~there, float("-inf")).softmax(-1).mean(0)
            alive = visual[~hidden[layer][b][visual]]
            best = alive[total[alive].argsort(descending=True)[: len(record.indices[b])]]
            assert visual[record.indices[b]].tolist() == sorted(best.tolist())
            dropped += len(alive) - len(best)
    assert dropped > 0


@torch.no_grad()
def test_what_is_recycled_counts_among_the_survivors() -> None:
    model, inputs = llava(), batch(*ROWS)
    with vtprune.prune(model, SparseVLM(layers=(0, 1, 2)), 0.7) as session:
        model(**inputs)
        report, plan = session.report, session.plan
    counts = [[len(i) for i in record.indices] for record in report.kept]
    assert [row[0] for row in counts] == [stage.count(16) for stage in plan.stages]
    assert report.kept[0].merged is not None
    with vtprune.prune(model, SparseVLM(layers=(0, 1, 2), recycle=False), 0.7) as session:
        model(**inputs)
        assert session.report.kept[0].merged is None
        assert [[len(i) for i in record.indices] for record in session.report.kept] == counts


def test_where_and_when_it_is_refused() -> None:
    model = llava()
    with pytest.raises(PlanError, match="sparsevlm reads what enters the decoder; it cannot cut at restart"):
        vtprune.prune(model, Plan((Stage(Site("restart", 1), SparseVLM(), 4),)))
    inputs = batch(Row())
    with (
        vtprune.prune(model, SparseVLM(layers=(0, 1, 2)), 0.7),
        pytest.raises(InputError, match="sparsevlm would read a draft"),
    ):
        model(**inputs, logits_to_keep=3, use_cache=True)
    for knobs, message in (
        ({"layers": (1, 2)}, r"layers must be 3 increasing numbers from 0 on, got \(1, 2\)"),
        ({"layers": (2, 2, 3)}, r"got \(2, 2, 3\)"),
        ({"recycle": 1}, "recycle must be True or False, got 1"),
        ({"positions": "x"}, "positions must be 'keep' or 'compact', got 'x'"),
    ):
        with pytest.raises(PlanError, match=f"sparsevlm .*{message}"):
            SparseVLM(**knobs)
    with pytest.raises(PlanError, match="sparsevlm needs 3 layers below 4"):
        vtprune.prune(model, SparseVLM(layers=(1, 2, 3)), 0.7)


@torch.no_grad()
def test_it_runs_behind_a_cut_at_the_input() -> None:
    model, inputs = llava(), batch(*ROWS)
    with vtprune.prune(model, "random@3/4+sparsevlm(layers=(0,1,2))", 0.5):
        together = model(**inputs).logits
        for b, row in enumerate(ROWS):
            alone = model(**batch(row)).logits[0]
            torch.testing.assert_close(together[b, -1], alone[-1], atol=1e-5, rtol=1e-5)
