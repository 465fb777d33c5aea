"""DART: four tokens by hand, a slow plain reference, and the pivots read off a model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import IMAGE, Row, batch, llava
from scorer_views import LLAVA, WIDTH, Sample, seen, token_view
from test_selections import plane
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Site
from vtprune.scorers.dart import DART
from vtprune.views import TextView


def duplicates(states: Tensor, norm: Tensor, words: Tensor, size: Tensor, keep: int, rule: DART) -> list[int]:
    """The rule one token at a time: states [V, D] with norms [V] of their keys, words [R, D] with sizes [R]."""
    unit, said = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (states, words))
    mine = norm.argsort(descending=True).tolist()[: min(rule.visual, keep)]
    theirs = size.argsort(descending=True).tolist()[: rule.text]
    pivots = [unit[i] for i in mine] + [said[i] for i in theirs]
    kept, left = list(mine), keep - len(mine)
    share = math.ceil(left / len(pivots))
    for pivot in pivots:
        rest = sorted((i for i in range(len(states)) if i not in kept), key=lambda i: float(unit[i] @ pivot))
        kept += rest[: min(share, keep - len(kept))]
    return sorted(kept)


def test_on_six_tokens_by_hand() -> None:
    view = token_view([Sample(((1, 6),), text=2)], [4])
    said = TextView(plane(0, 90)[:, :2], torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    norm = torch.tensor([[1.0, 9.0, 2.0, 3.0, 4.0, 5.0]])
    words = torch.tensor([1.0, -1.0]).expand(1, 6, 2)
    view = dataclasses.replace(view, hidden=plane(0, 10, 80, 100, 170, 200), text=said)
    view = dataclasses.replace(view, memory={"norm": norm, "words": words})
    rule = DART(visual=1, text=2)
    # the pivots are the token at 10 degrees and the word at 90; 3 places, so 2 for the first: 200 (190 away) and 170
    # (160 away). The word's own: 0 is 90 away, 80 and 100 are 10 away
    assert rule.select(view)[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    # without text there are 3 for the token: 100 is next
    alone = dataclasses.replace(view, memory={"norm": norm, "words": torch.full((1, 6, 2), -1.0)})
    assert rule.select(alone)[0].nonzero()[:, 0].tolist() == [1, 3, 4, 5]
    for keep in range(7):
        cut = dataclasses.replace(view, keep=torch.tensor([keep]))
        assert int(rule.select(cut).sum()) == keep


@pytest.mark.parametrize("keep", [3, 5, 9, 20])
def test_it_equals_the_rule(keep: int) -> None:
    samples = [Sample(((4, 7),), seed=1, text=9), Sample(((5, 5),), seed=2, text=3)]
    rule = DART()
    view = seen(rule, samples, (keep, keep))
    for b, sample in enumerate(samples):
        key = sample.normal("key0", 2, len(sample.alive) + sample.text, 8).abs().sum((0, 2))
        total = sample.total
        want = duplicates(
            view.hidden[b, :total], key[:total], view.text.hidden[b, : sample.text], key[total:], keep, rule
        )
        assert rule.select(view)[b].nonzero()[:, 0].tolist() == want


@torch.no_grad()
def test_pivots_and_states_are_those_of_the_model() -> None:
    model, rows = llava(), (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(1, 6, 2, 3))
    inputs, rule, got = batch(*rows), DART(layer=2), {}
    layers = model.model.language_model.layers

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        key = module.k_proj(states).unflatten(-1, (-1, module.head_dim))
        half = key.shape[-1] // 2
        turned = key * cos[:, :, None] + torch.cat([-key[..., half:], key[..., :half]], -1) * sin[:, :, None]
        got["norm"] = turned.abs().sum((2, 3))

    handles = [
        layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True),
        layers[1].register_forward_hook(lambda m, a, out: got.update(states=out)),
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    with vtprune.prune(model, rule, 0.8) as session:
        model(**inputs)
        report = session.report
    assert str(report.kept[0].site) == "layer[2]"
    for b in range(3):
        visual = inputs["input_ids"][b] == IMAGE
        said = inputs["attention_mask"][b].bool() & ~visual
        states, norm = got["states"][b], got["norm"][b]
        keep = len(report.kept[0].indices[b])
        want = duplicates(states[visual], norm[visual], states[said], norm[said], keep, rule)
        assert 8 < keep < int(visual.sum())
        assert report.kept[0].indices[b].tolist() == want


def test_equal_tokens_are_told_apart_by_order_and_padding_is_no_word() -> None:
    view = seen(DART(), [Sample(((3, 3),), text=0), Sample(((2, 2),), text=2)], (5, 3), poison=1e4)
    assert (view.memory["words"][0] == -1).all()
    assert view.memory["words"][1, 0, 2:].tolist() == [-1, -1]
    assert sorted(view.memory["words"][1, 0, :2].tolist()) == [0, 1]
    same = dataclasses.replace(view, hidden=torch.ones(2, 9, WIDTH))
    same = dataclasses.replace(same, memory={**view.memory, "norm": torch.ones(2, 9)})
    assert torch.equal(DART().select(same), torch.arange(9) < torch.tensor([[5], [3]]))
    with pytest.raises(PlanError, match="dart reads the prompt's text"):
        DART().select(dataclasses.replace(view, text=None))


def test_plan_and_knobs() -> None:
    (stage,) = DART().plan(LLAVA, Budget(64)).stages
    assert (stage.site, stage.keep) == (Site("layer", 2), 30)
    with pytest.raises(BudgetError, match="dart cannot reach 20 of 576"):
        DART().plan(LLAVA, Budget(20))
    for knobs, message in (
        ({"layer": 0}, "layer must be an int >= 1 or None, got 0"),
        ({"visual": 0}, "visual must be an int >= 1, got 0"),
        ({"text": -1}, "text must be an int >= 0, got -1"),
        ({"positions": "x"}, "positions must be 'keep' or 'compact', got 'x'"),
    ):
        with pytest.raises(PlanError, match=f"dart {message}"):
            DART(**knobs)
