"""SpAtten: its sum worked by hand, its schedule, and the whole cascade against the unpruned model."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from family_models import CASES
from family_models import Row as Media
from models import IMAGE, LAYERS, Row, batch, llava
from oracle import hidden_keys, masked, renumbered
from scorer_views import LLAVA
from test_pyramids import watching

import vtprune
from vtprune.budget import Budget
from vtprune.errors import BudgetError, PlanError
from vtprune.scorers import tower_end
from vtprune.scorers.spatten import SpAtten
from vtprune.views import AttentionView


def four_tokens() -> AttentionView:
    """One head, two visual tokens between two of text; keys are 0 or log 2, so that weights are powers of two."""
    two = math.log(2.0)
    # each query is 1, so that the logits of a row are the keys it sees: weights 1, 2, 1, 2 before they are normalised
    key = torch.tensor([0.0, two, 0.0, two]).view(1, 1, 4, 1)
    real = torch.ones(4, 4, dtype=torch.bool).tril()[None]
    return AttentionView(
        block=0,
        query=torch.ones(1, 1, 4, 1),
        key=key,
        value=key,
        scaling=1.0,
        real=real,
        column=torch.tensor([[1, 2]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        query_value=key,
        has_cls=False,
        rows=torch.ones(1, 4, dtype=torch.bool),
    )


def test_four_tokens_by_hand() -> None:
    """Rows see 1, 2, 3 and 4 keys: token 1 gets 2/3 + 2/4 + 2/6, token 2 gets 1/4 + 1/6."""
    view = four_tokens()
    first = SpAtten().observe(view, {})
    torch.testing.assert_close(first["importance"], torch.tensor([[1.5, 5 / 12]]))
    # the sum goes on over layers, and a row that is padding adds nothing, whatever it holds
    rows = torch.tensor([[True, True, True, False]])
    query = view.query.clone()
    query[0, 0, 3] = math.nan
    second = SpAtten().observe(dataclasses.replace(view, rows=rows, query=query), first)
    torch.testing.assert_close(second["importance"], torch.tensor([[1.5 + 7 / 6, 5 / 12 + 1 / 4]]))


def test_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SpAtten().observe(four_tokens(), {})["importance"]
    read = []
    rows = tower_end.attention_rows
    monkeypatch.setattr(tower_end, "_BLOCK", 12)
    monkeypatch.setattr(
        tower_end, "attention_rows", lambda query, *a, **k: read.append(query.shape[2]) or rows(query, *a, **k)
    )
    assert torch.equal(SpAtten().observe(four_tokens(), {})["importance"], whole)
    assert read == [3, 1]


def test_the_line_of_survivors() -> None:
    plan = SpAtten().plan(LLAVA, Budget(288))
    # 15 % of 32 layers are 4.8
    assert [s.site.index for s in plan.stages] == list(range(5, 32))
    counts = [s.keep for s in plan.stages]
    steps = {a - b for a, b in itertools.pairwise(counts)}
    assert max(steps) - min(steps) <= 1
    tokens = plan.tokens_per_layer((576,) * 32, 576)
    assert sum(tokens) / 32 == pytest.approx(288, abs=0.5)
    assert tokens[:5] == (576,) * 5
    # half steeper than level around the mean of what is pruned
    mean = sum(counts) / len(counts)
    assert counts[0] / mean == pytest.approx(1.5, abs=0.02)
    assert counts[-1] / mean == pytest.approx(0.5, abs=0.02)
    level = SpAtten(spread=0.0).plan(LLAVA, Budget(288))
    assert [s.site.index for s in level.stages] == [5]
    with pytest.raises(BudgetError, match="spatten cannot reach 64 of 576") as caught:
        SpAtten().plan(LLAVA, Budget(64))
    assert caught.value.floor is not None
    assert 90 < caught.value.floor < 93
    assert len(SpAtten(untouched=0.03).plan(LLAVA, Budget(64)).stages) > 20
    with pytest.raises(BudgetError, match="spatten needs a budget"):
        SpAtten().plan(LLAVA, Budget(None))
    with pytest.raises(PlanError, match=r"untouched=0\.99 leaves no layer to cut before in a decoder of 32 layers"):
        SpAtten(untouched=0.99).plan(LLAVA, Budget(0.5))


@pytest.mark.parametrize("keep", [0.9, 0.7])
@torch.no_grad()
def test_the_cascade_equals_the_rule(keep: float) -> None:
    """All attention maps of the unpruned model in which what left earlier is hidden, summed up to each cut."""
    rows = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(1, 6, 2, 3))
    model, inputs = llava(), batch(*rows)
    with vtprune.prune(model, SpAtten(), keep=keep) as session:
        model(**inputs)
        report = session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    seen, handles = watching(model)
    with masked(model, hidden), renumbered(model, session.plan, hidden):
        model(**inputs)
    for handle in handles:
        handle.remove()
    causal = torch.ones(inputs["input_ids"].shape[1], inputs["input_ids"].shape[1], dtype=torch.bool).tril()
    assert [str(r.site) for r in report.kept] == ["layer[1]", "layer[2]", "layer[3]"]
    for b in range(len(rows)):
        real = inputs["attention_mask"][b].bool()
        visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0]
        importance, left = torch.zeros(len(real)), visual
        for record in report.kept:
            layer = record.site.index - 1
            query, key = seen[layer]
            there = real & ~hidden[layer][b]
            logits = (query[b] @ key[b].transpose(1, 2)) / math.sqrt(key.shape[-1])
            weights = logits.masked_fill(~(causal & there), float("-inf")).softmax(-1).nan_to_num(nan=0.0)
            # rows that are gone ask no more
            importance += weights[:, there].mean(0).sum(0)
            left = left[torch.isin(left, there.nonzero()[:, 0])]
            best = left[importance[left].argsort(descending=True)[: len(record.indices[b])]]
            assert visual[record.indices[b]].tolist() == sorted(best.tolist())
    assert [len(record.indices[0]) for record in report.kept] == sorted(
        (len(record.indices[0]) for record in report.kept), reverse=True
    )


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "mistral3"])
@torch.no_grad()
def test_windows_blocks_and_rotary_axes_count_as_the_host_attends(name: str) -> None:
    """Against the maps that the host itself gives, which knows its windows and two-way blocks."""
    case = CASES[name]
    rows = (Media((("image", case.sizes[0]),), 3, 5, 0), Media((("image", case.sizes[1]),), 1, 4, 1))
    model, inputs = case.model("eager"), case.batch(*rows)
    depth = vtprune.geometry(case.config()).layers
    maps = model(**inputs, output_attentions=True).attentions[: depth - 1]
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", depth - 1), SpAtten(), 0.5),))
    with vtprune.prune(model, plan, record_scores=True) as session:
        model(**inputs)
        scores = session.report.kept[0].scores
    assert scores is not None
    asks = inputs["attention_mask"].float()[:, None, :, None]
    # the score is a mean over heads
    want = sum((layer.mean(1) * asks[:, 0]).sum(1) for layer in maps)
    for b in range(2):
        visual = case.visual(inputs["input_ids"])[b]
        torch.testing.assert_close(scores[b], want[b][visual], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"untouched": 0.0}, r"untouched must be a number in \(0, 1\), got 0.0"),
        ({"untouched": True}, r"untouched must be a number in \(0, 1\), got True"),
        ({"spread": 1.0}, r"spread must be a number in \[0, 1\), got 1.0"),
        ({"positions": "x"}, "positions must be 'keep' or 'compact', got 'x'"),
    ],
)
def test_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"spatten {message}"):
        SpAtten(**knobs)


def test_it_cannot_cut_in_a_tower() -> None:
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("vision", 2), SpAtten(), 8),))
    with pytest.raises(PlanError, match=r"spatten reads the prompt; it cannot cut at vision\[2\]"):
        vtprune.prune(llava(), plan)
