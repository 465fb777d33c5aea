"""PyramidDrop and HoloV: their rules worked by hand, and against slow references on a model."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, renumbered
from scorer_views import LLAVA, Sample
from test_selections import picked, plane, view_of
from test_tower_end import ROWS, attention_of, kept_of, tower_of
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Site
from vtprune.scorers.pyramiddrop import PyramidDrop
from vtprune.selections.crops import Crops

# PyramidDrop


def test_the_papers_schedule_and_its_floor() -> None:
    plan = PyramidDrop().plan(LLAVA, Budget(None))
    assert [(s.site, s.keep) for s in plan.stages] == [
        (Site("layer", 8), 288),
        (Site("layer", 16), 144),
        (Site("layer", 24), 72),
    ]
    tokens = plan.tokens_per_layer((576,) * 32, 576)
    assert sum(tokens) / 32 == 270
    # the average that the paper's cuts have gives the paper's cuts
    assert PyramidDrop().plan(LLAVA, Budget(270)) == plan
    with pytest.raises(BudgetError, match="pyramiddrop cannot reach 128 of 576") as caught:
        PyramidDrop().plan(LLAVA, Budget(128))
    # 8 layers of 576; then 24 of a few
    assert caught.value.floor is not None
    assert caught.value.floor > 144
    early = PyramidDrop(layers=(2, 4, 8)).plan(LLAVA, Budget(64))
    assert [s.site.index for s in early.stages] == [2, 4, 8]
    with pytest.raises(PlanError, match="pyramiddrop needs 3 layers below 3"):
        PyramidDrop().plan(dataclasses.replace(LLAVA, layers=3), Budget(None))


def watching(model: torch.nn.Module) -> tuple[dict[int, tuple[Tensor, Tensor]], list]:
    """Queries and keys [B, H, N, d] of each decoder layer after RoPE, as it runs, and what stops that."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.language_model.layers):

        def look(module: torch.nn.Module, args: tuple, kwargs: dict, index: int = index) -> None:
            states = kwargs["hidden_states"] if not args else args[0]
            cos, sin = kwargs["position_embeddings"]
            query, key = (
                p(states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in (module.q_proj, module.k_proj)
            )

            def turn(x: Tensor) -> Tensor:
                half = x.shape[-1] // 2
                return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

            key = turn(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
            seen[index] = turn(query), key

        handles.append(layer.self_attn.register_forward_pre_hook(look, with_kwargs=True))
    return seen, handles


@pytest.mark.parametrize("positions", ["keep", "compact"])
@torch.no_grad()
def test_it_asks_the_layer_behind_each_cut(positions: str) -> None:
    """The row of the last token, from the unpruned model in which what left earlier is hidden."""
    rows = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(1, 6, 2, 3)) if positions == "keep" else (Row(1, 3, 5, 0),)
    model, inputs = llava(), batch(*rows)
    method = PyramidDrop(layers=(1, 2, 3), positions=positions)
    with vtprune.prune(model, method) as session:
        model(**inputs)
        report = session.report
    assert {s.positions for s in session.plan.stages} == {positions}
    assert [str(r.site) for r in report.kept] == ["layer[1]", "layer[2]", "layer[3]"]
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    seen, handles = watching(model)
    # before the cut at layer k the layer is asked with the positions of the layers in front of it
    for cut, record in enumerate(report.kept):
        layer = record.site.index
        before = [h if i < layer else hidden[layer - 1] for i, h in enumerate(hidden)]
        shorter = vtprune.Plan(session.plan.stages[:cut])
        with masked(model, before), renumbered(model, shorter, before):
            model(**inputs)
        query, key = seen[layer]
        for b in range(len(rows)):
            there = inputs["attention_mask"][b].bool() & ~before[layer][b]
            logits = (query[b, :, -1:] * key[b]).sum(-1) / math.sqrt(key.shape[-1])
            weights = logits.masked_fill(~there, float("-inf")).softmax(-1).mean(0)
            alive = (there & (inputs["input_ids"][b] == IMAGE)).nonzero()[:, 0]
            best = alive[weights[alive].argsort(descending=True)[: len(record.indices[b])]]
            visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0]
            assert visual[record.indices[b]].tolist() == sorted(best.tolist())
    for handle in handles:
        handle.remove()
    counts = [[len(i) for i in record.indices] for record in report.kept]
    assert [row[0] for row in counts] == [8, 4, 2]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"ratios": (0.5, 0.6)}, r"ratios must fall from below 1 to above 0, got \(0.5, 0.6\)"),
        ({"layers": (3, 2, 5)}, r"layers must be 3 increasing numbers from 1 on, one a ratio, got \(3, 2, 5\)"),
        ({"positions": "x"}, "positions must be 'keep' or 'compact', got 'x'"),
    ],
)
def test_pyramiddrop_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"pyramiddrop {message}"):
        PyramidDrop(**knobs)


# HoloV


def holistic(states: Tensor, scores: Tensor, keep: int, number: int, balance: float) -> list[int]:
    """The rule one token at a time."""
    n = len(states)
    edges = [i * n // number for i in range(number + 1)]
    runs = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    variance = []
    for run in runs:
        for i in run:
            others = [float(unit[i] @ unit[j]) for j in run if j != i]
            mean = sum(others) / max(1, len(others))
            spread = sum((x - mean) ** 2 for x in others) / (len(others) - 1) if len(others) > 1 else 0.0
            variance.append(spread)
    attention = [1000.0 * float(s) for s in scores[:n]]
    scale = (sum(attention) / n) / (sum(variance) / n) if any(variance) else 0.0
    holism = [a + balance * v * scale for a, v in zip(attention, variance, strict=True)]
    weight = [sum(holism[i] for i in run) / max(1, len(run)) for run in runs]
    quota = [0] * number
    left = keep
    while left:
        open_runs = [r for r in range(number) if quota[r] < len(runs[r])]
        total = sum(weight[r] for r in open_runs)
        gets = {r: min(len(runs[r]) - quota[r], math.floor(left * weight[r] / total)) for r in open_runs}
        if not any(gets.values()):
            gets = dict.fromkeys(sorted(open_runs, key=lambda r: -weight[r])[:left], 1)
        for r, n_more in gets.items():
            quota[r] += n_more
        left -= sum(gets.values())
    chosen = [i for run, q in zip(runs, quota, strict=True) for i in sorted(run, key=lambda i: -attention[i])[:q]]
    return sorted(chosen)


@pytest.mark.parametrize(("keep", "number", "balance"), [(9, 4, 0.09), (20, 5, 0.0), (7, 16, 3.0), (26, 3, 50.0)])
def test_crops_equal_the_rule(keep: int, number: int, balance: float) -> None:
    samples = [Sample(((3, 9),), seed=1), Sample(((5, 6),), seed=2)]
    view, scores = view_of(*samples, keep=(keep, keep))
    want = [holistic(view.hidden[b, :n], scores[b], keep, number, balance) for b, n in enumerate((27, 30))]
    assert picked(Crops(number, balance), view, scores) == want


def test_variances_are_of_samples() -> None:
    # runs of 3 and 4, in which n - 1 and n - 2 weigh differently
    for seed in range(8):
        view, scores = view_of(Sample(((1, 7),), seed=seed), keep=(3,))
        assert picked(Crops(2, 50.0), view, scores) == [holistic(view.hidden[0], scores[0], 3, 2, 50.0)]


def test_crops_by_hand() -> None:
    view, _ = view_of(Sample(((1, 6),)), keep=(2,))
    view = dataclasses.replace(view, hidden=plane(0, 0, 0, 0, 90, 180))
    # two runs of three with equal attention; the first is flat, so the second gets all of the variety. v of its 0, 90,
    # 180: cosines (0, -1), (0, 0), (-1, 0): 1/2, 0, 1/2; mean over the sample 1/6. With balance 1, in units of the mean
    # attention: h = 1 in the first run, and 1 + (3 + 0 + 3) / 3 = 3 in the second: quotas 2/4 and 6/4, floor 0 and 1,
    # then the heaviest
    scores = torch.ones(1, 6)
    assert picked(Crops(2, 1.0), view, scores) == [[3, 4]]
    assert picked(Crops(2, 0.0), view, scores) == [[0, 3]]
    four = dataclasses.replace(view, keep=torch.tensor([5]))
    # 15/4 of three fit: 3, and two for the first
    assert picked(Crops(2, 1.0), four, scores) == [[0, 1, 3, 4, 5]]


@torch.no_grad()
def test_holov_keeps_what_the_rule_says() -> None:
    model, inputs = llava("sdpa", "clip"), batch(*ROWS)
    weights, _, features = tower_of(model, inputs["pixel_values"])
    attention = attention_of(weights, True)
    with vtprune.prune(model, vtprune.HoloV(crops=3, balance=0.5), 0.375) as session:
        model(**inputs)
        found = kept_of(session.report)
    assert found == [holistic(features[i, 1:], attention[i], 6, 3, 0.5) for i in range(3)]
    assert len(found[0]) == 6 < TOKENS


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"crops": 0}, "number must be an int >= 1, got 0"), ({"balance": -1}, "balance must be a number >= 0, got -1")],
)
def test_holov_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"crops {message}"):
        vtprune.HoloV(**knobs)
