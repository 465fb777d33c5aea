"""GemFilter and the site `restart[k]`: golden numbers, products by hand, what the first pass costs and leaves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import transformers
from family_models import CASES, Row
from oracle import hidden_keys, masked
from scorer_views import LLAVA, Sample, attention_view
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.budget import Budget
from vtprune.cost import plan_cost
from vtprune.errors import BudgetError, HostContractError, PlanError
from vtprune.hooks.asking import ask
from vtprune.hooks.probe import attach_probe
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.gemfilter import GemFilter, filter_scores

EXACT = {"atol": 1e-5, "rtol": 1e-5}
RAW = [
    -0.18817496,
    -0.57918012,
    -0.89179569,
    -1.08371091,
    -1.12895107,
    -1.02139282,
    -0.775594,
    -0.42482209,
    -0.01655233,
]
POOLED = [
    -0.33183017,
    -0.54857236,
    -0.77436256,
    -0.94100606,
    -0.98028886,
    -0.88689423,
    -0.67346251,
    -0.44767228,
    -0.24339369,
]


def sines(shape: tuple[int, ...], a: float, b: float, c: float) -> Tensor:
    """sin(a row + b column + c), the generator of the golden inputs."""
    row = torch.arange(math.prod(shape[:-1]), dtype=torch.float64)[:, None]
    return torch.sin(a * row + b * torch.arange(shape[-1], dtype=torch.float64) + c).reshape(shape).float()


KEY, QUERY = sines((1, 2, 9, 4), 0.37, 1.1, 0.3), sines((1, 2, 1, 4), 0.9, 0.5, 0.7)


def test_scores_equal_the_authors_function() -> None:
    torch.testing.assert_close(filter_scores(QUERY, KEY, pool=1), torch.tensor([RAW]), rtol=1e-5, atol=0)
    pooled = filter_scores(QUERY, KEY)
    torch.testing.assert_close(pooled, torch.tensor([POOLED]), rtol=1e-5, atol=0)
    # edge tokens win, because zeros outside the sequence are averaged in
    assert pooled[0].topk(4).indices.tolist() == [8, 0, 7, 1]
    inside = filter_scores(QUERY, KEY, count_include_pad=False)[0]
    assert inside[2:7].tolist() == pooled[0, 2:7].tolist()
    assert inside[0].item() == pytest.approx(sum(RAW[:3]) / 3, rel=1e-5)


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_padding_counts_like_the_outside(count_include_pad: bool) -> None:
    key = torch.cat([torch.full((1, 2, 3, 4), 1e4), KEY], 2)
    real = torch.tensor([[False] * 3 + [True] * 9])
    found = filter_scores(QUERY, key, real, count_include_pad=count_include_pad)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3:], filter_scores(QUERY, KEY, count_include_pad=count_include_pad))


def test_query_heads_of_a_group_share_a_key() -> None:
    query = torch.randn(2, 6, 1, 4, generator=torch.Generator().manual_seed(0))
    key = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(1))
    repeated = filter_scores(query, key.repeat_interleave(3, 1))
    torch.testing.assert_close(filter_scores(query, key), repeated)


@pytest.mark.parametrize("padded", [True, False])
def test_keys_of_earlier_calls_count_like_the_outside(padded: bool) -> None:
    samples = [Sample(((2, 3),)), Sample(((3, 3),), 1)] if padded else [Sample(((2, 3),))]
    view = attention_view(samples, poison=0.0)
    view = view if padded else dataclasses.replace(view, real=None)
    earlier = torch.full((*view.key.shape[:2], 3, view.key.shape[3]), 1e4)
    later = dataclasses.replace(
        view,
        key=torch.cat([earlier, view.key], 2),
        real=None if view.real is None else torch.cat([view.real.new_ones(len(samples), 3), view.real], 1),
        column=view.column + 3,
        first=3,
    )
    want = GemFilter().observe(view, {})["product"]
    torch.testing.assert_close(GemFilter().observe(later, {})["product"], want)


# schedule


def test_the_first_pass_counts() -> None:
    plan = GemFilter().plan(LLAVA, Budget(300))
    (stage,) = plan.stages
    assert (str(stage.site), stage.scorer) == ("restart[13]", GemFilter(layer=13))
    assert plan.passes(LLAVA.entering, 576) == ((13, 576),)
    # 13 layers of 576 tokens, then 32 of what is left
    assert (
        plan_cost(plan, LLAVA, "average")
        == pytest.approx((13 * 576 + 32 * stage.count(576)) / 32)
        == pytest.approx(300, abs=1)
    )
    with pytest.raises(BudgetError, match=r"gemfilter cannot reach 192 .* change the knob 'layer'") as error:
        GemFilter().plan(LLAVA, Budget(192))
    assert error.value.floor == 13 * 576 / 32 + 1
    assert GemFilter(layer=4).plan(LLAVA, Budget(192)).stages[0].keep == 120
    assert GemFilter().plan(LLAVA, Budget(64, "final")).stages[0].keep == 64
    assert plan_cost(GemFilter(layer=0).plan(LLAVA, Budget(64)), LLAVA, "average") == 64
    # nothing is asked where nothing is dropped
    assert GemFilter().plan(LLAVA, Budget(1.0)).passes(LLAVA.entering, 576) == ()


def test_layer_scales_and_positions_are_passed_on() -> None:
    for depth, layer in ((32, 13), (40, 16), (12, 5), (2, 1)):
        model = dataclasses.replace(LLAVA, layers=depth, entering=())
        assert GemFilter().plan(model, Budget(0.9)).stages[0].site == Site("restart", layer)
    for positions in ("keep", "compact"):
        assert GemFilter(positions=positions).plan(LLAVA, Budget(300)).stages[0].positions == positions
    plan = GemFilter().plan(LLAVA, Budget(300))
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"layer": -1}, "layer must be an int >= 0 or None, got -1"),
        ({"pool": 4}, "pool must be an odd int >= 1, got 4"),
        ({"positions": "shift"}, "positions must be 'keep' or 'compact', got 'shift'"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        GemFilter(**knobs)


def test_sites_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"layer must be in \[0, 31\] \(32 decoder layers\), got 32"):
        GemFilter(layer=32).plan(LLAVA, Budget(300))
    model = CASES["llava"].model()
    for stage, message in (
        (Stage(Site("restart", 4), GemFilter(), 8), r"restart\[4\] is outside the decoder, which has layers 0 to 3"),
        (Stage(Site("restart", 2), vtprune.Uniform(), 8), r"uniform reads no attention, so there is nothing to ask"),
        (
            Stage(Site("restart", 2), vtprune.TransPrune(), 8),
            r"transprune reads what decoder layers do.*use 'layer\[k\]'",
        ),
        (Stage(Site("vision", 2), GemFilter(), 8), r"gemfilter reads the prompt; it cannot cut at vision\[2\]"),
    ):
        with pytest.raises(PlanError, match=message):
            vtprune.prune(model, Plan((stage,)))
    with pytest.raises(PlanError, match=r"got restart\[2\] \(gemfilter\) after layer\[1\]"):
        vtprune.prune(model, ["fastv", GemFilter(layer=2)], [0.6, 0.55])


# on models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_products_equal_those_by_hand(name: str, attention: str) -> None:
    """Queries and keys of the unpruned model; the prompt is padded, pooling runs over text and image alike."""
    case = CASES[name]
    inputs = case.batch(Row((("image", case.sizes[0]),), 3, 5, 0), Row((("image", case.sizes[1]),), 1, 9, 1))
    model = case.model(attention)
    found = {}
    for knobs in (5, True), (3, False):
        method = GemFilter(layer=2, pool=knobs[0], count_include_pad=knobs[1])
        with vtprune.prune(model, method, 5, basis="final", record_scores=True) as session:
            model(**inputs)
            found[knobs] = session.report.kept[0].scores
    plain, seen = case.model(attention), []
    module = plain.model.language_model.layers[2].self_attn
    undo = attach_probe(module, lambda q, k, v, scaling, softcap: seen.append((q, k)))
    plain(**inputs)
    undo()
    query, key = seen[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    for b, visual in enumerate(case.visual(inputs["input_ids"])):
        real = inputs["attention_mask"][b].bool()
        raw = [float((query[b, :, -1] * key[b, :, n]).sum()) if real[n] else 0.0 for n in range(len(real))]
        if name == "gemma3":
            # the layer slides: keys outside the window of the last token are not seen
            raw = [x if n > len(real) - 1 - 12 else 0.0 for n, x in enumerate(raw)]
        inside = [float(x != 0.0) for x in raw]
        for (pool, outside), scores in found.items():
            near = [slice(max(0, n - pool // 2), n + pool // 2 + 1) for n in range(len(raw))]
            want = [sum(raw[part]) / (pool if outside else max(1.0, sum(inside[part]))) for part in near]
            torch.testing.assert_close(scores[b], torch.tensor(want)[visual], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
@torch.no_grad()
def test_products_of_a_later_turn_equal_those_by_hand(mask: bool) -> None:
    case = CASES["llava"]
    model, first = case.model(), case.batch(Row((), 7, 0, 5))
    turn = case.batch(Row((("image", None),), 1, 5, 1))
    turn["attention_mask"] = torch.cat([first["attention_mask"], turn["attention_mask"]], 1) if mask else None
    with vtprune.prune(model, GemFilter(layer=2), 5, basis="final", record_scores=True) as session:
        model(**turn, past_key_values=model(**first).past_key_values)
        scores = session.report.kept[0].scores
    cache, seen = model(**first).past_key_values, []
    undo = attach_probe(model.model.language_model.layers[2].self_attn, lambda q, k, *rest: seen.append((q, k)))
    model(**turn, past_key_values=cache)
    undo()
    query, key = seen[0]
    want = filter_scores(query[:, :, -1:], key[:, :, first["input_ids"].shape[1] :])
    assert scores is not None
    torch.testing.assert_close(scores[0], want[case.visual(turn["input_ids"])], rtol=1e-4, atol=1e-5)


def shortened(model: Any, inputs: dict[str, Any], visual: Tensor, kept: Tensor, positions: str) -> dict[str, Any]:
    """A LLaVA prompt that never held other visual tokens than `kept`."""
    places = visual[0].nonzero()[:, 0]
    stays = ~visual[0]
    stays[places[kept]] = True
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, places] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    position = stays.nonzero()[:, 0] if positions == "keep" else torch.arange(int(stays.sum()))
    # a mask, or the host reads gaps as the ends of sequences
    return {
        "inputs_embeds": embeds[:, stays],
        "position_ids": position[None],
        "attention_mask": torch.ones(1, len(position), dtype=torch.long),
    }


@torch.no_grad()
def test_compact_positions_equal_a_prompt_that_never_held_the_tokens() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)))
    with vtprune.prune(model, GemFilter(layer=2, positions="compact"), 6, basis="final") as session:
        got = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        kept = session.report.kept[0].indices[0]
    short = shortened(model, inputs, case.visual(inputs["input_ids"]), kept, "compact")
    want = model.generate(inputs_embeds=short["inputs_embeds"], max_new_tokens=5, do_sample=False)
    assert torch.equal(got[0, -5:], want[0, -5:])


@pytest.mark.parametrize("positions", ["keep", "compact"])
@torch.no_grad()
def test_a_pass_behind_a_cut_equals_a_prompt_that_never_held_the_tokens(positions: Any) -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)))
    visual = case.visual(inputs["input_ids"])
    first = Stage(Site("input"), vtprune.Uniform(), 9, positions=positions)
    plan = Plan((first, Stage(Site("restart", 2), GemFilter(layer=2), 4)))
    with vtprune.prune(model, plan, record_scores=True) as session:
        got = model(**inputs, past_key_values=transformers.DynamicCache()).logits[:, -1]
        entered, left = session.report.kept
    seen = []
    undo = attach_probe(model.model.language_model.layers[2].self_attn, lambda q, k, *rest: seen.append((q, k)))
    model(**shortened(model, inputs, visual, entered.indices[0], positions))
    undo()
    begin = int(visual[0].nonzero()[0])
    want = filter_scores(seen[0][0][:, :, -1:], seen[0][1])[0, begin : begin + 9]
    assert left.scores is not None
    torch.testing.assert_close(left.scores[0], want, rtol=1e-4, atol=1e-5)
    # the second pass closes up too
    short = shortened(model, inputs, visual, left.indices[0], positions)
    torch.testing.assert_close(got, model(**short).logits[:, -1], **EXACT)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_both_passes_are_counted(name: str) -> None:
    case = CASES[name]
    model = case.model("eager")
    inputs = case.batch(*[Row((("image", case.sizes[0]),), 3, 5, seed) for seed in range(2)])

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return sum(counter.get_flop_counts()["Global"].values())

    whole = counted()
    for method, keep in ((GemFilter(layer=1), 4), (vtprune.TransPrune(layers=(1, 2, 3)), 7)):
        with vtprune.prune(model, method, keep, basis="final") as session:
            part, report = counted(), session.report
        # scoring itself (a few rows against the keys) is not counted, and is much in models as tiny as these
        assert part - whole == pytest.approx(report.flops - report.flops_full, abs=0.02 * report.flops_full)
    with vtprune.prune(model, GemFilter(layer=2), 4, basis="final") as session:
        model(**inputs)
        report = session.report
    total = report.visual_tokens[0]
    assert report.restarted == (2 * total,) * 2
    rows = inputs["input_ids"].shape[1]
    assert report.asked == ((2, rows),)
    with vtprune.prune(model, ["gemfilter(layer=1)", vtprune.TransPrune(layers=(1, 2, 3))], [8, 5], basis="final") as s:
        model(**inputs)
    (first, *later) = s.report.asked
    assert first == (1, rows)
    # at each cut that drops something, as many rows as enter it
    tokens = s.report.tokens_per_layer[0]
    assert later == [(0, rows - total + t) for t, after in itertools.pairwise(tokens) if after < t]
    assert len(later) >= 2
    assert s.report.to_dict()["asked"] == [list(each) for each in s.report.asked]
    assert report.average_tokens == ((2 * total + 4 * 4) / 4,) * 2
    assert report.to_dict()["restarted"] == [2 * total] * 2


@torch.no_grad()
def test_the_first_pass_leaves_nothing_behind() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)), Row((("image", None),), 1, 4, 1))
    base = model(**inputs).logits
    with vtprune.prune(model, GemFilter(layer=2), 4, basis="final") as session:
        out = model(**inputs, output_hidden_states=True)
        assert len(out.hidden_states) == 5
        text = int((~case.visual(inputs["input_ids"]) & inputs["attention_mask"].bool()).sum(1).max())
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [4 + text] * 4
        caches: list[bool] = []
        note = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: caches.append(kwargs.get("past_key_values") is not None), with_kwargs=True
        )
        again = model(**inputs, past_key_values=transformers.DynamicCache())
        note.remove()
        assert caches == [False, True]
        assert torch.equal(out.logits, again.logits)
        assert session.report.kv_bytes == sum(
            t.nbytes for layer in again.past_key_values.layers for t in (layer.keys, layer.values)
        )
    assert torch.equal(model(**inputs).logits, base)


def test_gradients_flow_through_the_second_pass_alone() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    graphs: list[bool] = []
    note = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda *a: graphs.append(torch.is_grad_enabled())
    )
    with vtprune.prune(model, GemFilter(layer=2, positions="keep"), 6, basis="final") as session:
        graphs.clear()  # of a dry call
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        report = session.report
    note.remove()
    assert graphs == [False, True]
    got = [p.grad.clone() for p in model.model.language_model.parameters()]
    model.zero_grad()
    with masked(model, hidden_keys(report, inputs["input_ids"], 4)):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    for mine, theirs in zip(got, model.model.language_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-5, rtol=1e-4)


def test_an_exception_in_the_first_pass_leaves_the_model_usable() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)))

    def fail(module: Any, args: Any) -> None:
        raise ZeroDivisionError

    with vtprune.prune(model, GemFilter(layer=2), 4, basis="final") as session, torch.no_grad():
        want = model(**inputs).logits
        handle = model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, want)
        assert session.report.kept


def test_a_layer_that_nobody_broke_off_is_an_error() -> None:
    with pytest.raises(HostContractError, match="decoder layer 3 ran without transformers' attention interface"):
        ask(lambda: None, 3)
