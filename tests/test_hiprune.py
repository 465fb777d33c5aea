"""HiPrune: a grid by hand, a slow plain rule, and both blocks read off the models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from models import TOKENS, batch, llava
from scorer_views import LLAVA, Sample, attention_view, seen, token_view
from test_tower_end import LAST, ROWS, kept_of
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import PlanError
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.hiprune import HiPrune, beside
from vtprune.scorers.random_tokens import Random
from vtprune.scorers.tower_end import received_attention


def hierarchy(middle: Tensor, deep: Tensor, cols: int, keep: int, alpha: float) -> list[int]:
    """The rule one token at a time on a grid that is whole."""
    number = len(middle)
    keep = min(keep, number)
    anchors = middle.argsort(descending=True).tolist()[: round(keep * alpha / 5)]
    around = {
        j
        for i in anchors
        for j in range(number)
        if abs(i // cols - j // cols) + abs(i % cols - j % cols) == 1 and j not in anchors
    }
    buffers = sorted(around, key=lambda j: -float(middle[j]))[: keep - len(anchors)]
    rest = [j for j in deep.argsort(descending=True).tolist() if j not in (*anchors, *buffers)]
    return sorted([*anchors, *buffers, *rest[: keep - len(anchors) - len(buffers)]])


def test_on_a_grid_by_hand() -> None:
    view = token_view([Sample(((3, 3),))], [6])
    middle = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.0, 0.4, 0.5, 0.6, 0.7]])
    deep = torch.tensor([[0.3, 0.9, 0.1, 0.8, 0.2, 0.1, 0.0, 0.7, 0.6]])
    view = dataclasses.replace(view, memory={"object": middle, "deep": deep})

    def kept(keep: int, alpha: float) -> list[int]:
        cut = dataclasses.replace(view, keep=torch.tensor([keep]))
        return HiPrune(alpha=alpha).select(cut)[0].nonzero()[:, 0].tolist()

    # round(6 * 0.9 / 5) = 1 anchor, the corner 2; beside it 1 and 5 (not 3, which begins the next row); then by the
    # deep block 3, 7 and 8
    assert kept(6, 0.9) == [1, 2, 3, 5, 7, 8]
    # no anchor (0.12): registers alone
    assert kept(6, 0.1) == [0, 1, 3, 4, 7, 8]
    # round(8 / 5) = 2 anchors, 2 and 8; beside them 1, 5 and 7; then 3, 0 and 4
    assert kept(8, 1.0) == [0, 1, 2, 3, 4, 5, 7, 8]
    # round(3 / 5) = 1 anchor and room for both beside it; halves go to even: round(2.5 / 5) = 0
    assert kept(3, 1.0) == [1, 2, 5]
    assert kept(5, 0.5) == [0, 1, 3, 7, 8]
    # buffers that find no room: the best by the middle block stay
    wide = dataclasses.replace(view, memory={"object": torch.tensor([[0, 1, 0, 2, 9, 3, 0, 4, 0.0]]), "deep": deep})
    for keep, want in ((3, [4, 5, 7]), (4, [3, 4, 5, 7])):
        cut = dataclasses.replace(wide, keep=torch.tensor([keep]))
        assert HiPrune(alpha=1.0).select(cut)[0].nonzero()[:, 0].tolist() == want


def test_neighbours_stay_in_their_picture_and_may_be_gone() -> None:
    view = token_view([Sample(((2, 2), (2, 3))), Sample(((3, 1),), gone=(1,))], [1, 1])
    marks = torch.zeros_like(view.valid)
    # the end of the first picture, and of the second one's first row; the top of a column whose middle is gone
    marks[0, [3, 6]], marks[1, 0] = True, True
    assert beside(view, marks)[0].nonzero()[:, 0].tolist() == [1, 2, 5, 9]
    assert not beside(view, marks)[1].any()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.4, 1.0])
def test_it_equals_the_rule(alpha: float) -> None:
    samples = [Sample(((5, 7),), seed=1), Sample(((4, 3),), seed=2), Sample(((9, 9),), seed=3)]
    rule = HiPrune(alpha=alpha)
    for keep in ((1, 1, 1), (17, 5, 60), (34, 11, 30)):
        view = seen(rule, samples, keep)
        other = torch.zeros_like(view.memory["deep"])
        for b, sample in enumerate(samples):
            other[b, : sample.total] = sample.normal("middle", sample.total).abs()
        view = dataclasses.replace(view, memory={**view.memory, "object": other})
        for b, sample in enumerate(samples):
            deep, cols = view.memory["deep"][b, : sample.total], sample.grids[0][1]
            want = hierarchy(other[b, : sample.total], deep, cols, keep[b], alpha)
            assert rule.select(view)[b].nonzero()[:, 0].tolist() == want


def test_what_all_queries_pay_counts_cls_as_one_of_them() -> None:
    view = attention_view((Sample(((2, 3),), seed=1),), has_cls=True)
    every = torch.randn(1, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    view = dataclasses.replace(view, every_query=every)
    weights = (every[0] @ view.key[0].repeat_interleave(2, 0).transpose(1, 2) * view.scaling).softmax(-1)
    torch.testing.assert_close(received_attention(view, by_all=True)[0], weights.mean((0, 1))[1:])
    assert (received_attention(view)[0] - weights.mean((0, 1))[1:]).abs().max() > 1e-3


def received(model: Any, pixels: Tensor, block: int, lead: int) -> Tensor:
    """[images, TOKENS] what patches receive in a block of the unpruned tower."""
    layer, got = model.model.vision_tower.encoder.layers[block], {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        query, key = (p(states).unflatten(-1, (module.num_heads, -1)) for p in (module.q_proj, module.k_proj))
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        got["weights"] = logits.softmax(-1).mean((1, 2))

    handle = layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    model.get_image_features(pixels)
    handle.remove()
    return got["weights"][:, lead:]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_it_keeps_what_two_blocks_of_the_tower_attend_to(tower: str) -> None:
    model, inputs = llava("sdpa", tower), batch(*ROWS)
    # 9 of 24 and 16 of 32, of 7: the third and the fourth block
    block, lead = (2, 1) if tower == "clip" else (3, 0)
    middle, deep = (received(model, inputs["pixel_values"], k, lead) for k in (block, LAST))
    with vtprune.prune(model, HiPrune(alpha=0.6), 0.5) as session:
        logits, report = model(**inputs).logits, session.report
        assert session.plan.stages[0].scorer == HiPrune(alpha=0.6, block=block)
    assert [str(r.site) for r in report.kept] == [f"vision[{LAST}]"]
    assert kept_of(report) == [hierarchy(middle[i], deep[i], 4, 8, 0.6) for i in range(3)]
    with vtprune.prune(model, HiPrune(alpha=0.6, block=LAST), 0.5) as session:
        assert not torch.equal(model(**inputs).logits, logits)
        assert kept_of(session.report) == [hierarchy(deep[i], deep[i], 4, 8, 0.6) for i in range(3)]


@torch.no_grad()
def test_what_the_middle_block_said_follows_a_cut_between() -> None:
    model, inputs = llava(), batch(*ROWS)
    plan = Plan(
        (
            Stage(Site("vision", 3), Random(), 0.7),
            Stage(Site("vision", LAST), HiPrune(alpha=1.0, block=1), 0.3),
        )
    )
    middle = received(model, inputs["pixel_values"], 1, 1)
    with vtprune.prune(model, plan) as session:
        model(**inputs)
        first, last = (record.indices for record in session.report.kept)
    images = [(b, i) for b, row in enumerate(ROWS) for i in range(row.images)]
    for image, (b, i) in enumerate(images):
        left = [int(t) - i * TOKENS for t in first[b] if t // TOKENS == i]
        kept = [int(t) - i * TOKENS for t in last[b] if t // TOKENS == i]
        # 5 tokens, one anchor, and what is left beside it
        anchor = max(left, key=lambda t: float(middle[image, t]))
        around = [t for t in left if abs(t // 4 - anchor // 4) + abs(t % 4 - anchor % 4) == 1]
        assert {anchor, *around} <= set(kept)


def test_plan_and_knobs() -> None:
    (stage,) = HiPrune().plan(LLAVA, Budget(64)).stages
    assert (stage.site, stage.keep, stage.scorer) == (Site("vision", 22), 64, HiPrune(block=8))
    assert list(HiPrune(block=8).watches(stage.site)) == [8, 22]
    assert list(HiPrune(block=22).watches(stage.site)) == list(HiPrune().watches(stage.site)) == [22]
    vision = LLAVA.vision
    assert vision is not None
    qwen = dataclasses.replace(vision, blocks=32, feature_block=31, has_cls=False)
    for full, want in ((None, 15), ((7, 15, 23, 31), 15), ((3, 10, 31), 10)):
        shape = dataclasses.replace(LLAVA, vision=dataclasses.replace(qwen, full_blocks=full))
        assert HiPrune().plan(shape, Budget(64)).stages[0].scorer == HiPrune(block=want)
    with pytest.raises(PlanError, match=r"hiprune block must be in \[0, 22\], .* got 23"):
        HiPrune(block=23).plan(LLAVA, Budget(64))
    for knobs, message in (
        ({"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"block": -1}, "block must be a tower block, an int >= 0, or None, got -1"),
    ):
        with pytest.raises(PlanError, match=f"hiprune {message}"):
            HiPrune(**knobs)
