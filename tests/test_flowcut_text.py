"""FlowCut's cut in the decoder: its score written out, its place and positions, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from family_models import CASES, Row
from scorer_views import LLAVA, Sample, attention_view, seen
from torch import Tensor

import vtprune
from vtprune.budget import Budget, Geometry
from vtprune.contract import AttentionView
from vtprune.cost import plan_cost
from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Plan
from vtprune.scorers.flowcut_text import FlowCutText

SAMPLES = (Sample(((3, 4),), seed=1), Sample(((2, 3),), seed=2, text=9), Sample((), seed=3))


def written_out(view: AttentionView, b: int, tokens: int, norm: str = "head_mean") -> Tensor:
    """The score of sample b's tokens, a head and a token at a time in float64; 4 query heads share 2 of keys."""
    query, last = view.query[b, :, 0].double(), view.query_value[b, :, 0].double()
    columns = view.column[b, :tokens].tolist()
    key, value = view.key[b].double(), view.value[b].double()
    r, m = torch.zeros(tokens, dtype=torch.float64), torch.zeros(tokens, dtype=torch.float64)
    for head in range(4):
        mine = head // 2
        logits = [view.scaling * float(query[head] @ key[mine, c]) for c in columns]
        if view.softcap is not None:
            logits = [view.softcap * math.tanh(x / view.softcap) for x in logits]
        sees = [view.real is None or bool(view.real[b, c]) for c in columns]
        weights = [math.exp(x) if see else 0.0 for x, see in zip(logits, sees, strict=True)]
        r += torch.tensor(weights, dtype=torch.float64) / sum(weights) / 4
        # key and value heads are repeated for their queries
        weights = [math.exp(float(last[mine] @ value[mine, c]) / 8**0.5) for c in columns]
        m += torch.tensor(weights, dtype=torch.float64) / sum(weights) / 4
    u = []
    for c in columns:
        heads = [value[h, c] for h in range(2)]
        u.append(float((sum(heads) / 2).abs().sum() if norm == "head_mean" else sum(v.abs().sum() for v in heads)))  # type: ignore[union-attr]
    return ((r / r.sum() + m / m.sum()) * torch.tensor(u, dtype=torch.float64)).float()


def score(view: AttentionView, scorer: FlowCutText | None = None) -> Tensor:
    return (scorer or FlowCutText()).observe(view, {})["score"]


@pytest.mark.parametrize("norm", ["head_mean", "all_heads"])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_score_equals_the_formula(norm: Any, softcap: float | None) -> None:
    """Ragged prompts, left-padded with NaN; a prompt without an image scores nothing."""
    view = dataclasses.replace(attention_view(SAMPLES), softcap=softcap)
    got = score(view, FlowCutText(value_norm=norm))
    assert got.dtype == torch.float32
    for b, sample in enumerate(SAMPLES):
        if sample.total:
            torch.testing.assert_close(got[b, : sample.total], written_out(view, b, sample.total, norm))
        assert (got[b, sample.total :] == 0).all()


def test_score_in_closed_form() -> None:
    """Two heads, two tokens, one text key that draws nearly all attention and must not count."""
    key = torch.tensor([[[0.0], [math.log(3.0)], [50.0]]]).expand(1, 1, 3, 1)
    value = torch.tensor([[[[1.0], [-2.0], [0.0]]]])
    view = AttentionView(
        block=1,
        query=torch.tensor([[[[1.0]], [[0.0]]]]),
        key=key,
        value=value,
        scaling=1.0,
        real=None,
        column=torch.tensor([[0, 1]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        query_value=torch.tensor([[[[math.log(2.0)]]]]),
        has_cls=False,
    )
    # r: (1/4, 3/4) of one head and (1/2, 1/2) of the other; m: 2 to 1/4, that is (8/9, 1/9); norms 1 and 2
    want = torch.tensor([[3 / 8 + 8 / 9, (5 / 8 + 1 / 9) * 2]])
    torch.testing.assert_close(score(view), want)


def test_values_are_scaled_by_their_own_width_whatever_the_models_factor() -> None:
    view = attention_view(SAMPLES[:1])
    other = dataclasses.replace(view, scaling=2 * view.scaling)
    torch.testing.assert_close(score(other)[0], written_out(other, 0, 12))
    assert not torch.equal(score(other), score(view))


def test_a_window_takes_the_attention_and_leaves_the_likeness() -> None:
    view = attention_view(SAMPLES[:1])
    real = torch.ones(1, view.key.shape[2], dtype=torch.bool)
    real[0, :4] = False
    part = dataclasses.replace(view, real=real)
    got = score(part)
    torch.testing.assert_close(got[0], written_out(part, 0, 12))
    assert (got > 0).all()
    blind = dataclasses.replace(view, real=real.clone().fill_(False))
    assert (score(blind) > 0).all()
    assert not torch.equal(score(blind), got)


def test_tokens_that_left_do_not_weigh() -> None:
    """The softmax runs over what is alive: a token that is gone changes the score although its key is still there."""
    view = attention_view(SAMPLES[:1])
    fewer = dataclasses.replace(view, column=view.column[:, 3:], valid=view.valid[:, 3:])
    torch.testing.assert_close(score(fewer)[0], written_out(fewer, 0, 9))


def test_each_sample_keeps_its_best_tokens() -> None:
    view = seen(FlowCutText(), SAMPLES, (5, 2, 0))
    kept = FlowCutText().select(view)
    signals = attention_view(SAMPLES, block=0)
    for b, count in enumerate((5, 2)):
        best = written_out(signals, b, SAMPLES[b].total).topk(count).indices.sort().values
        assert kept[b].nonzero()[:, 0].tolist() == best.tolist()
    assert not kept[2].any()


# plan


def test_plan_is_one_stage_at_the_papers_depth() -> None:
    for depth, layer in ((32, 2), (28, 2), (4, 1), (64, 4)):
        (stage,) = FlowCutText().plan(dataclasses.replace(LLAVA, layers=depth, entering=()), Budget(0.6)).stages
        assert str(stage.site) == f"layer[{layer}]"
        assert not stage.adaptive
    plan = FlowCutText(layer=5).plan(LLAVA, Budget(192))
    assert str(plan.stages[0].site) == "layer[5]"
    assert plan_cost(plan, LLAVA, "average") == pytest.approx(192, abs=0.5)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("facts", "default"),
    [({}, "compact"), ({"rotary_axes": 3}, "keep"), ({"windows": (None, 512) * 16}, "keep")],
    ids=["plain", "M-RoPE", "windows"],
)
def test_positions_close_up_where_that_is_legal(facts: dict[str, Any], default: str) -> None:
    shape = dataclasses.replace(LLAVA, **facts)
    assert FlowCutText().plan(shape, Budget(0.5)).stages[0].positions == default
    assert FlowCutText(positions="keep").plan(shape, Budget(0.5)).stages[0].positions == "keep"
    assert FlowCutText(positions="compact").plan(shape, Budget(0.5)).stages[0].positions == "compact"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"layer": 0}, r"flowcut-text layer must be an int >= 1 or None, got 0"),
        ({"layer": True}, r"flowcut-text layer must be an int >= 1 or None, got True"),
        ({"positions": "shift"}, r"flowcut-text positions must be 'keep', 'compact' or None, got 'shift'"),
        ({"value_norm": "l2"}, r"flowcut-text value_norm must be 'head_mean' or 'all_heads', got 'l2'"),
    ],
)
def test_knobs_out_of_range(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FlowCutText(**knobs)


def test_plan_refuses_what_it_cannot_do() -> None:
    with pytest.raises(PlanError, match=r"flowcut-text layer must be in \[1, 31\] \(32 decoder layers\), got 32"):
        FlowCutText(layer=32).plan(LLAVA, Budget(0.5))
    # (2 * 576 + 30) / 32
    with pytest.raises(
        BudgetError, match=r"flowcut-text cannot reach 30 .* at least 36.94.* the knob 'layer'"
    ) as error:
        FlowCutText().plan(LLAVA, Budget(30))
    assert error.value.floor == pytest.approx(36.9375)


def test_prune_refuses_compact_positions_under_mrope_and_draft_tokens() -> None:
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(Row((("image", case.sizes[0]),)))
    with pytest.raises(PlanError, match="positions='compact' has no meaning with rotary positions of 3 axes"):
        vtprune.prune(model, FlowCutText(positions="compact"), 0.5)
    with (
        vtprune.prune(model, "flowcut", 0.5),
        pytest.raises(
            vtprune.InputError, match=r"and flowcut-text would read a draft .* Generate without an assistant"
        ),
    ):
        model(**inputs, logits_to_keep=3)
    with vtprune.prune(model, vtprune.FlowCut(text_cut=False), 0.5):
        assert model(**inputs, logits_to_keep=3).logits.shape[1] == 3


# on a model


@torch.no_grad()
def test_the_model_keeps_what_its_own_attention_says() -> None:
    """Scores recomputed from queries, keys and values of a LLaVA's layer 1, grouped heads, two padded prompts."""
    case = CASES["llava"]
    rows = (Row((("image", None),), 3, 5, 0), Row((("image", None), ("image", None)), 1, 4, 1))
    model, inputs = case.model("eager"), case.batch(*rows)
    layer = model.model.language_model.layers[1]
    caught: dict[str, Any] = {}
    handle = layer.self_attn.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    with vtprune.prune(model, FlowCutText(layer=2), 0.6, record_scores=True) as session:
        model(**inputs)
        kept = session.report.kept[0]
    handle.remove()
    attention, hidden = layer.self_attn, caught["hidden_states"]
    cos, sin = (t[:, None] for t in caught["position_embeddings"])

    def heads(projection: Any) -> Tensor:
        return projection(hidden).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * cos + torch.cat([-second, first], -1) * sin

    query, key, value = turned(heads(attention.q_proj)), turned(heads(attention.k_proj)), heads(attention.v_proj)
    group = query.shape[1] // key.shape[1]
    assert group > 1
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    visual = case.visual(inputs["input_ids"])
    assert kept.scores is not None
    for b in range(2):
        last = int(inputs["attention_mask"][b].nonzero()[-1, 0])
        k, v = key[b][:, visual[b]], value[b][:, visual[b]]
        r, m = (
            (torch.einsum("hvd,hd->hv", states, row[b, :, last]) / attention.head_dim**0.5).softmax(1).mean(0)
            for states, row in ((k, query), (v, value))
        )
        want = (r + m) * v.mean(0).abs().sum(1)
        torch.testing.assert_close(kept.scores[b], want, atol=1e-6, rtol=1e-4)
        count = len(kept.indices[b])
        assert kept.indices[b].tolist() == want.topk(count).indices.sort().values.tolist()


def geometry(**facts: Any) -> Geometry:
    return dataclasses.replace(LLAVA, **{"family": "llava_next", "dynamic": True, "entering": (), **facts})


@pytest.mark.parametrize(
    ("basis", "tower", "decoder"),
    # 640 = (2 * 2 T + 30 T) / 32 on average
    [("final", 1280, 640), ("average", 1204, 602)],
)
def test_schedule_of_llava_next(basis: str, tower: int, decoder: int) -> None:
    plan = vtprune.FlowCut().plan(geometry(visual_tokens=2880), Budget.make(640, basis=basis))
    assert [str(s.site) for s in plan.stages] == [*(f"vision[{k}]" for k in range(1, 22, 2)), "layer[2]"]
    assert {s.keep for s in plan.at("vision")} == {tower}
    assert plan.stages[-1].keep == decoder
    assert plan.stages[-1].scorer == FlowCutText()
    assert plan.stages[-1].positions == "compact"
    assert [s.adaptive for s in plan.stages] == [True] * 10 + [False, False]
    assert plan.tokens_per_layer((2880,) * 32, 2880) == (tower,) * 2 + (decoder,) * 30
    assert Plan.from_dict(plan.to_dict()) == plan


def test_schedule_of_qwen2_vl() -> None:
    """32 blocks of which the last is the feature block, 28 decoder layers, two thirds of the tokens gone."""
    assert LLAVA.vision is not None
    tower = dataclasses.replace(LLAVA.vision, blocks=32, feature_block=31, has_cls=False, cell=4, patches=5184)
    shape = geometry(layers=28, visual_tokens=1296, vision=tower, rotary_axes=3)
    plan = vtprune.FlowCut().plan(shape, Budget(1 / 3, "final"))
    assert [s.site.index for s in plan.at("vision")] == list(range(2, 31, 2))
    assert {s.count(1296) for s in plan.at("vision")} == {864}
    assert str(plan.stages[-1].site) == "layer[2]"
    assert plan.stages[-1].count(1296) == 432
    assert plan.stages[-1].positions == "keep"


@pytest.mark.parametrize("factor", [1.0, 1.5, 2, 4.0])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_a_share_is_the_average_and_the_tower_never_keeps_more_than_all(share: float, factor: float) -> None:
    shape = geometry(visual_tokens=2880)
    plan = vtprune.FlowCut(tower_factor=factor).plan(shape, Budget(share))
    decoder = plan.stages[-1].keep
    (tower,) = {s.keep for s in plan.at("vision")}
    assert isinstance(decoder, float)
    assert tower == min(1.0, factor * decoder)
    assert (2 * tower + 30 * decoder) / 32 == pytest.approx(share, abs=1e-9)
    for total in (17, 576, 2880):
        cost = plan_cost(plan, geometry(visual_tokens=total), "average")
        assert abs(cost - share * total) <= 0.5


def test_other_bases_and_counts_with_the_text_cut() -> None:
    shape = geometry(visual_tokens=2880)
    final = vtprune.FlowCut().plan(shape, Budget(0.2, "final"))
    assert (final.stages[0].keep, final.stages[-1].keep) == (0.4, 0.2)
    flops = vtprune.FlowCut().plan(shape, Budget(0.3, "flops"))
    assert plan_cost(flops, shape, "flops") == pytest.approx(0.3, abs=0.001)
    assert isinstance(flops.stages[-1].keep, float)
    whole = vtprune.FlowCut().plan(shape, Budget(2880))
    assert {s.keep for s in whole.stages} == {2880}
    most = vtprune.FlowCut().plan(shape, Budget(2800))
    assert {s.keep for s in most.at("vision")} == {2880}
    assert plan_cost(most, shape, "average") == pytest.approx(2800, abs=1)
    with pytest.raises(BudgetError, match=r"flowcut cannot reach 0.001 of the prefill FLOPs"):
        vtprune.FlowCut().plan(geometry(visual_tokens=2880, text_tokens=500), Budget.make(flops=0.001))


def test_a_share_counts_what_an_earlier_method_took() -> None:
    """Of 1000 tokens 300 enter: the layers before the text cut see those, and not twice the target."""
    shape = dataclasses.replace(geometry(visual_tokens=1000), entering=(300,) * 32)
    plan = vtprune.FlowCut().plan(shape, Budget(0.2))
    assert plan.tokens_per_layer(shape.entering, 1000) == (300,) * 2 + (193,) * 30


def test_where_the_text_cut_is_on() -> None:
    moving = geometry(visual_tokens=2880)

    def sites(shape: Geometry, text_cut: bool | None) -> set[str]:
        return {s.site.kind for s in vtprune.FlowCut(text_cut=text_cut).plan(shape, Budget(0.3)).stages}

    assert sites(LLAVA, None) == sites(LLAVA, False) == sites(moving, False) == {"vision"}
    assert sites(LLAVA, True) == sites(moving, None) == {"vision", "layer"}
    # the tower alone goes to the target itself
    assert {s.keep for s in vtprune.FlowCut(text_cut=False).plan(moving, Budget(0.3)).stages} == {0.3}
    cut = {
        name: bool(vtprune.FlowCut().plan(vtprune.geometry(CASES[name].config()), Budget(0.9)).at("layer"))
        for name in ("llava", "gemma3", "internvl", "idefics3", "video_llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
    }
    assert [name for name, on in cut.items() if on] == ["llava_next", "qwen2_vl", "qwen2_5_vl"]


def test_the_norm_of_values_is_passed_on() -> None:
    plan = vtprune.FlowCut(value_norm="all_heads").plan(geometry(visual_tokens=2880), Budget(640))
    assert plan.stages[-1].scorer == FlowCutText(value_norm="all_heads")


def test_a_second_method_at_the_same_layer_needs_the_tower_alone() -> None:
    model = CASES["llava_next"].model()
    with pytest.raises(PlanError, match=r"got layer\[1\] \(fastv\) after layer\[1\] \(flowcut-text\)"):
        vtprune.prune(model, ["flowcut", "fastv"], [0.6, 0.4])
    vtprune.prune(model, [vtprune.FlowCut(text_cut=False), FlowCutText(positions="keep")], [0.6, 0.4]).remove()


@torch.no_grad()
def test_positions_close_up_whether_or_not_a_batch_mate_loses_tokens_there() -> None:
    """The tower leaves the second prompt 16 tokens, and the text cut's 16 leave it as it is; the first loses one."""
    case = CASES["llava_next"]
    model, rows = case.model(), [Row((("image", size),), 3, 5, i) for i, size in enumerate(case.sizes[:2])]
    inputs = case.batch(*rows)
    with vtprune.prune(model, vtprune.FlowCut(tower_factor=1.02), 0.3) as session:
        together, report = model(**inputs).logits, session.report
        assert [tokens[:2] for tokens in report.tokens_per_layer] == [(27, 26), (16, 16)]
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for b, row in enumerate(rows):
            alone = case.batch(row)
            logits = model(**alone).logits[0]
            torch.testing.assert_close(together[b, -len(logits) :], logits, atol=1e-5, rtol=1e-5)
            ids = model.generate(**alone, max_new_tokens=6, do_sample=False)
            assert torch.equal(out[b, -6:], ids[0, -6:])
