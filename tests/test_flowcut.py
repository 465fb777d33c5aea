"""FlowCut: golden numbers of the authors' functions, the signals written out, and the schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from scorer_views import LLAVA, Sample, attention_view, seen, token_view
from torch import Tensor

from vtprune.budget import Budget, VisionGeometry
from vtprune.contract import Memory
from vtprune.errors import BudgetError, PlanError, UnsupportedModelError
from vtprune.kernels.value_norms import value_norms
from vtprune.plan import Plan
from vtprune.scorers.flowcut import FlowCut
from vtprune.scorers.flowcut_signals import (
    flowcut_drop_count,
    flowcut_score,
    flowcut_score_mean_query,
)


def sines(shape: tuple[int, ...], a: float, b: float, c: float = 0.0, base: float = 0.0) -> Tensor:
    """base + sin(a row + b column + c), the generator of the golden inputs."""
    row = torch.arange(math.prod(shape[:-1]), dtype=torch.float64)[:, None]
    column = torch.arange(shape[-1], dtype=torch.float64)
    return (base + torch.sin(a * row + b * column + c)).reshape(shape).float()


CLS = sines((1, 8), 0.3, 0.9, 0.1, 1.5)
SEMANTIC = sines((1, 8), 0.2, 1.7, 0.5, 1.2)
VALUE = sines((1, 8, 4), 0.7, 1.3, 0.2)
NORM = VALUE.abs().sum(-1)
GOLDEN_CLS = [0.71676433, 1.17613792, 0.71739680, 0.47352213, 0.66036797, 0.51411349, 0.27757698, 0.58629870]
GOLDEN_MEAN = [3.7586958, 6.8810477, 6.8886313, 4.1356363, 2.1993542, 1.2523522, 2.4321954, 3.9486649]


# pure functions


def test_scores_equal_the_authors_functions() -> None:
    torch.testing.assert_close(flowcut_score(CLS, SEMANTIC, NORM), torch.tensor([GOLDEN_CLS]), rtol=1e-5, atol=0)
    torch.testing.assert_close(flowcut_score_mean_query(CLS, NORM), torch.tensor([GOLDEN_MEAN]), rtol=1e-5, atol=0)


def test_drop_counts_equal_the_authors_functions() -> None:
    attention = sines((1, 576), 0.0, 0.05, 0.0, 1.05)
    assert [flowcut_drop_count(attention, left, 64).item() for left in (20, 10, 2)] == [8, 12, 27]
    mean_query = (3 * sines((1, 64), 0.0, 0.31)).softmax(1)
    assert [flowcut_drop_count(mean_query, left, 16, epsilon=1e-7).item() for left in (30, 16, 2)] == [3, 4, 12]


def test_padding_changes_neither_score_nor_count() -> None:
    pad = torch.full((1, 5), math.nan)
    valid = torch.tensor([[True] * 8 + [False] * 5])
    score = flowcut_score(*(torch.cat([signal, pad], 1) for signal in (CLS, SEMANTIC, NORM)), valid)
    assert torch.equal(score[:, :8], flowcut_score(CLS, SEMANTIC, NORM))
    assert (score[:, 8:] == 0).all()
    attention = CLS.square()
    alone = flowcut_drop_count(attention, 1, 2)
    assert alone.item() > 0
    assert flowcut_drop_count(torch.cat([attention, pad], 1), 1, 2, valid).item() == alone.item()


def test_drop_count_in_closed_form() -> None:
    # 16 patches of which 4 share the attention: e = ln 4 / ln 16 = 1/2, so P = (16 - T) / sqrt(L) * 3/4
    attention = torch.tensor([[1.0] * 4 + [0.0] * 12])
    assert flowcut_drop_count(attention, 1, 4).item() == 9
    assert flowcut_drop_count(attention, 4, 4).item() == 4  # 4.5 rounds to even
    assert flowcut_drop_count(attention, 4, torch.tensor([12])).item() == 2  # 1.5 rounds to even
    assert flowcut_drop_count(torch.ones(1, 16), 1, 4).item() == 0
    assert flowcut_drop_count(torch.ones(1, 1), 1, 1).item() == 0
    assert flowcut_drop_count(torch.zeros(1, 4), 1, 9).item() == 0
    one_patch_takes_all = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert flowcut_drop_count(one_patch_takes_all, 1, 1, epsilon=1e-7).item() == 3


# schedule


def concentrated(patches: int, relative_entropy: float) -> Tensor:
    """[1, N] attention whose entropy is `relative_entropy` ln N: one patch against an even rest, found by bisection."""
    low, high = 1 / patches, 1.0
    for _ in range(200):
        p = (low + high) / 2
        q = (1 - p) / (patches - 1)
        entropy = -p * math.log(p) - ((1 - p) * math.log(q) if q > 0 else 0.0)
        low, high = (p, high) if entropy > relative_entropy * math.log(patches) else (low, p)
    return torch.tensor([[low] + [(1 - low) / (patches - 1)] * (patches - 1)], dtype=torch.float32)


@pytest.mark.parametrize(
    ("relative_entropy", "counts"),
    [
        (0.98, [571, 566, 561, 556, 550, 544, 537, 529, 520, 507, 64]),
        (0.9, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (0.8, [535, 495, 456, 418, 381, 345, 309, 273, 235, 191, 64]),
    ],
)
def test_schedule_at_constant_entropy(relative_entropy: float, counts: list[int]) -> None:
    alive, got = 576, []
    for stage in FlowCut().plan(LLAVA, Budget(64)).stages:
        memory = {"attention": concentrated(alive, relative_entropy)}
        view = token_view([Sample(((1, alive),))], [64], memory, site=str(stage.site))
        alive = int(stage.scorer.count(view))
        got.append(alive)
    assert got == counts


def test_plan_of_clip_is_the_papers() -> None:
    plan = FlowCut().plan(LLAVA, Budget(64))
    assert [str(s.site) for s in plan.stages] == [f"vision[{k}]" for k in range(1, 22, 2)]
    scorers = [s.scorer for s in plan.stages]
    assert all(isinstance(s, FlowCut) for s in scorers)
    assert [s.to_dict()["remaining"] for s in scorers] == list(range(20, -1, -2))
    assert [s.adaptive for s in plan.stages] == [True] * 10 + [False]
    assert {s.keep for s in plan.stages} == {64}
    assert plan.tokens_per_layer(LLAVA.entering, 576) == (64,) * 32
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("feature_block", "every", "blocks"),
    [
        (26, 2, list(range(1, 26, 2))),
        # block 0 would be the first of these; it has no history, so the steps start at 2
        (27, 2, list(range(2, 27, 2))),
        (4, 1, [1, 2, 3]),
        (4, 9, [3]),
        (1, 2, [0]),
    ],
)
def test_plan_of_other_towers(feature_block: int, every: int, blocks: list[int]) -> None:
    tower = VisionGeometry(27, feature_block, 1152, 16, 4304, False, 729, 588, (1152, 4096, 4096))
    plan = FlowCut(every=every).plan(dataclasses.replace(LLAVA, vision=tower), Budget(64))
    assert [s.site.index for s in plan.stages] == blocks
    assert [s.to_dict()["scorer"]["remaining"] for s in plan.stages] == [blocks[-1] - k for k in blocks]


def test_a_share_stays_a_share_for_every_image() -> None:
    assert {s.keep for s in FlowCut().plan(LLAVA, Budget(0.25)).stages} == {0.25}
    by_flops = FlowCut().plan(LLAVA, Budget.make(flops=0.5)).stages
    assert {type(s.keep) for s in by_flops} == {float}
    # a round number of tokens of this prompt
    assert by_flops[0].keep * 576 == pytest.approx(by_flops[0].count(576), abs=1e-9)


def test_plan_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"family 'llava' offers no tower block"):
        FlowCut().plan(dataclasses.replace(LLAVA, vision=None), Budget(64))
    with pytest.raises(BudgetError, match=r"flowcut cannot reach 0.001 of the prefill FLOPs"):
        FlowCut().plan(LLAVA, Budget.make(flops=0.001))


# signals

SAMPLES = (Sample(((3, 4),), seed=1), Sample(((2, 3),), seed=2))


def signals(has_cls: bool, block: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Attention, semantic attention and head-averaged values of each sample, written out."""
    view = attention_view(SAMPLES, block=block, has_cls=has_cls)
    out = []
    for b in range(len(SAMPLES)):
        assert view.real is not None
        key, value = view.key[b][:, view.real[b]], view.value[b][:, view.real[b]]
        patches = slice(int(has_cls), int(has_cls) + SAMPLES[b].total)
        attention = torch.stack([(key[h // 2] @ view.query[b, h, 0] / 8**0.5).softmax(0) for h in range(4)]).mean(0)
        scale = 1.0 if has_cls else 8**-0.5
        semantic = torch.stack([(value[h] @ view.query_value[b, h, 0] * scale).softmax(0) for h in range(2)]).mean(0)
        out.append((attention[patches], semantic[patches], value.mean(0)[patches]))
    return out


@pytest.mark.parametrize("semantic", [None, True, False])
@pytest.mark.parametrize("has_cls", [True, False])
def test_observe_equals_the_formula(has_cls: bool, semantic: bool | None) -> None:
    memory = FlowCut(semantic=semantic).observe(attention_view(SAMPLES, block=0, has_cls=has_cls), {})
    uses_semantics = has_cls if semantic is None else semantic
    for b, (a, s, v) in enumerate(signals(has_cls)):
        norm = v.abs().sum(1)
        share = a / a.sum() if has_cls or uses_semantics else a
        want = (share + s / s.sum() if uses_semantics else share) * norm
        torch.testing.assert_close(memory["cumulative"][b, : SAMPLES[b].total], want)
        assert (memory["cumulative"][b, SAMPLES[b].total :] == 0).all()
        torch.testing.assert_close(memory["attention" if has_cls else "mean_attention"][b, : SAMPLES[b].total], a)


@pytest.mark.parametrize("semantic_softmax", ["code", "paper"])
@pytest.mark.parametrize("has_cls", [True, False])
def test_semantic_softmax_of_code_and_paper(has_cls: bool, semantic_softmax: Literal["code", "paper"]) -> None:
    """The paper's is scaled and over patches only; the code's has no scale and includes CLS."""
    view = attention_view(SAMPLES, block=0, has_cls=has_cls)
    scorer = FlowCut(semantic=True, semantic_softmax=semantic_softmax)
    got = scorer.observe(view, {})["cumulative"]
    for b, (a, s, v) in enumerate(signals(has_cls)):
        n = SAMPLES[b].total
        if semantic_softmax == "paper":
            patches = view.value[b][:, view.column[b, :n]]
            products = [patches[h] @ view.query_value[b, h, 0] / 8**0.5 for h in range(2)]
            s = torch.stack([row.softmax(0) for row in products]).mean(0)
        torch.testing.assert_close(got[b, :n], (a / a.sum() + s / s.sum()) * v.abs().sum(1))
        assert (got[b, n:] == 0).all()
    other = FlowCut(semantic=True, semantic_softmax="code" if semantic_softmax == "paper" else "paper")
    assert not torch.allclose(got, other.observe(view, {})["cumulative"], rtol=1e-4, atol=0)


def test_semantics_of_the_paper_survive_a_cls_token_that_outweighs_all() -> None:
    """A CLS value of great norm leaves nothing to the patches in the code's softmax."""
    view = attention_view(SAMPLES[:1], block=0, has_cls=True)
    value = view.value.clone()
    value[:, :, 0] = 60.0 * value[:, :, 1]
    view = dataclasses.replace(view, value=value, query_value=value[:, :, :1])

    def share(semantic: bool, softmax: Literal["code", "paper"]) -> Tensor:
        return FlowCut(semantic=semantic, semantic_softmax=softmax).observe(view, {})["cumulative"]

    assert torch.equal(share(True, "code"), share(False, "code"))
    assert not torch.equal(share(True, "paper"), share(False, "paper"))


@pytest.mark.parametrize("has_cls", [True, False])
def test_value_norm_over_all_heads(has_cls: bool) -> None:
    view = attention_view(SAMPLES, block=0, has_cls=has_cls)
    mean, every = (FlowCut(value_norm=n).observe(view, {})["cumulative"] for n in ("head_mean", "all_heads"))
    for b, sample in enumerate(SAMPLES):
        values = view.value[b][:, view.column[b, : sample.total]]
        ratio = values.abs().sum((0, 2)) / values.mean(0).abs().sum(1)
        torch.testing.assert_close(every[b, : sample.total], mean[b, : sample.total] * ratio)
        # opposite signs cancel only in the mean
        assert (ratio > 2.0 - 1e-6).all()
        assert ratio.max() > 2.1


def test_values_of_opposite_heads_cancel_only_in_their_mean() -> None:
    value = torch.tensor([[[[1.0, -2.0], [4.0, 0.0]], [[-1.0, 2.0], [2.0, 1.0]]]])
    column = torch.tensor([[1, 0]])
    assert value_norms(value, column, "head_mean").tolist() == [[3.5, 0.0]]
    assert value_norms(value, column, "all_heads").tolist() == [[7.0, 6.0]]
    half = value_norms(value.half(), column, "all_heads")
    assert half.dtype == torch.float32


@pytest.mark.parametrize("history", [0.0, 0.5, 0.9, 1.0])
def test_running_score_is_a_momentum(history: float) -> None:
    memory: Memory = {}
    want = None
    for block in range(3):
        memory = FlowCut(history=history).observe(attention_view(SAMPLES, block=block, has_cls=True), memory)
        now = FlowCut().observe(attention_view(SAMPLES, block=block, has_cls=True), {})["cumulative"]
        want = now if want is None else history * want + (1 - history) * now
        assert want is not None
        torch.testing.assert_close(memory["cumulative"], want)


@pytest.mark.parametrize("key", ["attention", "mean_attention"])
def test_count_works_per_image_and_never_below_the_target(key: str) -> None:
    samples = (Sample(((1, 16),)), Sample(((1, 4),)), Sample(()), Sample(((1, 16),)))
    attention = torch.zeros(4, 16)
    attention[0, :4] = 0.25
    attention[1, 0] = 1.0
    attention[3] = 1 / 16
    view = token_view(samples, (4, 3, 0, 4), {key: attention})
    # image 0: 16 - 12 * 3/4; image 1 would drop its only spare; image 3 attends evenly
    assert FlowCut(remaining=1).count(view).tolist() == [7, 3, 0, 16]
    assert FlowCut(remaining=0).count(view).tolist() == [4, 3, 0, 4]
    greedy = dataclasses.replace(view, keep=torch.tensor([15, 4, 0, 16]))
    assert FlowCut(remaining=1).count(greedy).tolist() == [15, 4, 0, 16]


def test_adaptive_count_does_not_depend_on_batch_mates() -> None:
    scorer = FlowCut(remaining=1)
    together = scorer.count(seen(scorer, SAMPLES, (2, 2))).tolist()
    assert together == [int(scorer.count(seen(scorer, (s,), (2,)))) for s in SAMPLES]
    assert together[0] < 12


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"history": 1.5}, r"history must be a number in \[0, 1\], got 1.5"),
        ({"history": "half"}, r"history must be a number in \[0, 1\], got 'half'"),
        ({"every": 0}, r"every must be an int >= 1, got 0"),
        ({"semantic": 1}, r"semantic must be True, False or None, got 1"),
        ({"semantic_softmax": "both"}, r"semantic_softmax must be 'code' or 'paper', got 'both'"),
        ({"value_norm": "l2"}, r"value_norm must be 'head_mean' or 'all_heads', got 'l2'"),
        ({"text_cut": "yes"}, r"text_cut must be True, False or None, got 'yes'"),
        ({"tower_factor": 0.5}, r"tower_factor must be a number >= 1, got 0.5"),
        ({"tower_factor": math.inf}, r"tower_factor must be a number >= 1, got inf"),
        ({"tower_factor": math.nan}, r"tower_factor must be a number >= 1, got nan"),
        ({"tower_factor": True}, r"tower_factor must be a number >= 1, got True"),
        ({"remaining": -2}, r"remaining must be an int >= 0, got -2"),
    ],
)
def test_knobs_out_of_range(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FlowCut(**knobs)  # pyright: ignore[reportArgumentType]
