"""TransPrune: golden numbers of the authors' function, the paper's schedule and cost, and its signals by hand."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from family_models import CASES, LAYERS, Row
from oracle import hidden_keys, masked
from scorer_views import LLAVA, Sample, token_view, transition_view
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.contract import Scorer, TokenView
from vtprune.cost import image_macs, plan_cost
from vtprune.errors import BudgetError, PlanError
from vtprune.hooks.cache import record_of
from vtprune.hooks.validate import asked_layers, watched_transitions
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers import instruction
from vtprune.scorers.transprune import TransPrune, transition_variation

NEXT = dataclasses.replace(LLAVA, visual_tokens=2880, entering=())


def sines(shape: tuple[int, ...], a: float, b: float, c: float = 0.0) -> Tensor:
    """sin(a row + b column + c), the generator of the golden inputs."""
    row = torch.arange(math.prod(shape[:-1]), dtype=torch.float64)[:, None]
    column = torch.arange(shape[-1], dtype=torch.float64)
    return torch.sin(a * row + b * column + c).reshape(shape).float()


BEFORE, AFTER = sines((1, 5, 6), 0.7, 1.3, 0.2), sines((1, 5, 6), 0.4, 0.8, 0.9)


@pytest.mark.parametrize(
    ("direction", "golden"),
    [
        ("signed", [0.16467859, 0.17625804, 0.18533681, 0.21583462, 0.27537450]),
        ("absolute", [0.17744316, 0.18992017, 0.19970265, 0.23256443, 0.22103330]),
    ],
)
def test_transitions_equal_the_authors_function(direction: Any, golden: list[float]) -> None:
    found = transition_variation(BEFORE, AFTER, direction=direction)
    torch.testing.assert_close(found, torch.tensor([golden]), rtol=1e-5, atol=0)


def test_transitions_of_padding_are_not_read() -> None:
    pad = torch.full((1, 2, 6), math.nan)
    real = torch.tensor([[False] * 2 + [True] * 5])
    found = transition_variation(torch.cat([pad, BEFORE], 1), torch.cat([pad, AFTER], 1), real)
    torch.testing.assert_close(found[:, 2:], transition_variation(BEFORE, AFTER))
    assert (found[:, :2] == 0).all()
    # nor is a sample of padding alone
    assert (transition_variation(BEFORE, AFTER, torch.zeros(1, 5, dtype=torch.bool)) == 0).all()


def test_transitions_of_half_precision_are_computed_in_fp32() -> None:
    halves = BEFORE.bfloat16(), AFTER.bfloat16()
    found, want = transition_variation(*halves), transition_variation(*(t.float() for t in halves))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_a_token_of_zeros_has_no_transition() -> None:
    before, after = BEFORE.clone(), AFTER.clone()
    before[:, 1] = after[:, 1] = 0.0
    found = transition_variation(before, after)
    assert found[0, 1] == 0
    # its turn, 1 - 0, is weighed against the others'
    turns = (1 - torch.cosine_similarity(before, after, dim=-1)).exp()
    want = after.norm(dim=-1) / BEFORE.norm(dim=-1) * turns / turns.sum()
    torch.testing.assert_close(found, want)


def test_the_direction_is_passed_on() -> None:
    view = transition_view([Sample(((2, 3),)), Sample(((3, 3),), 1)], 0, "mlp", poison=0.0)
    for direction in ("signed", "absolute"):
        found = TransPrune(direction=direction).observe_transition(view, {})["ttv"]  # type: ignore[arg-type]
        whole = transition_variation(view.before, view.after, view.real, direction=direction)  # type: ignore[arg-type]
        assert torch.equal(found, whole.gather(1, view.column))


def test_a_signal_without_a_sum_counts_nothing() -> None:
    """The instruction sees no image through a sliding window: the transitions decide."""
    ttv = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    view = token_view([Sample(((2, 2),))], [2], {"ttv": ttv, "iga": torch.zeros(1, 4)})
    torch.testing.assert_close(TransPrune(alpha=0.25).score(view), 0.25 * ttv / 8)


# schedule


@pytest.mark.parametrize(
    ("geometry", "final", "counts", "tera"),
    [(LLAVA, 72, (504, 360, 72), 1.557178), (NEXT, 360, (2520, 1800, 360), 8.330320)],
)
def test_the_high_setting_costs_what_the_paper_says(
    geometry: vtprune.Geometry, final: int, counts: tuple[int, ...], tera: float
) -> None:
    own = TransPrune().plan(geometry, Budget(None))
    assert [str(s.site) for s in own.stages] == ["layer[7]", "layer[9]", "layer[12]"]
    assert tuple(s.keep for s in own.stages) == counts
    tokens = own.tokens_per_layer(geometry.entering, geometry.visual_tokens)
    assert image_macs(geometry, tokens) / 1e12 == pytest.approx(tera, abs=5e-7)
    # the solver, asked for as many tokens at the end, finds the same schedule
    assert TransPrune().plan(geometry, Budget(final, "final")) == own


@pytest.mark.parametrize(("total", "counts"), [(30, [26, 18, 3]), (4, [3, 2, 1]), (0, [1, 1, 1])])
def test_ratios_are_cut_off_and_leave_a_token(total: int, counts: list[int]) -> None:
    plan = TransPrune().plan(dataclasses.replace(LLAVA, visual_tokens=total, entering=()), Budget(None))
    assert [s.keep for s in plan.stages] == counts


@pytest.mark.parametrize(("entering", "tera"), [(288, 0.66), (192, 0.44)])
def test_stacked_on_a_method_before_the_decoder_it_costs_what_the_paper_says(entering: int, tera: float) -> None:
    behind = LLAVA.after(vtprune.Uniform().plan(LLAVA, Budget(entering)))
    plan = TransPrune(ratios=(0.5, 0.25, 0.125)).plan(behind, Budget(None))
    assert [s.keep for s in plan.stages] == [entering // 2, entering // 4, entering // 8]
    tokens = plan.tokens_per_layer(behind.entering, 576)
    assert image_macs(LLAVA, tokens) / 1e12 == pytest.approx(tera, abs=0.005)


def test_other_budgets_keep_the_shares_of_what_is_dropped() -> None:
    for budget in (Budget(300), Budget(0.6), Budget.make(flops=0.6)):
        plan = TransPrune().plan(LLAVA, budget)
        dropped = [576 - s.count(576) for s in plan.stages]
        assert dropped[0] / dropped[2] == pytest.approx(1 / 7, abs=0.003)
        assert dropped[1] / dropped[2] == pytest.approx(3 / 7, abs=0.003)
    assert plan_cost(TransPrune().plan(LLAVA, Budget(300)), LLAVA, "average") == pytest.approx(300, abs=1)
    # 1 token at the end: (7 x 576 + 2 x 493.9 + 3 x 329.6 + 20) / 32
    with pytest.raises(BudgetError, match=r"transprune cannot reach 128 .* change the knob 'layers'") as error:
        TransPrune().plan(LLAVA, Budget(128))
    assert error.value.floor == pytest.approx((7 * 576 + 2 * 494 + 3 * 330 + 20) / 32, abs=0.1)


def test_layers_scale_with_depth_and_can_be_set() -> None:
    small = dataclasses.replace(LLAVA, layers=12, entering=())
    assert [s.site.index for s in TransPrune().plan(small, Budget(0.7)).stages] == [3, 4, 5]
    plan = TransPrune(layers=(2, 5, 10), since=0).plan(small, Budget(0.7))
    assert [s.site.index for s in plan.stages] == [2, 5, 10]
    assert [list(s.scorer.watches(s.site)) for s in plan.stages] == [list(range(n)) for n in (2, 5, 10)]
    # the paper's: transitions of layers 6 to 11 (counted from 0)
    for since in (None, 6, 30):
        stages = TransPrune(since=since).plan(LLAVA, Budget(None)).stages
        assert [list(s.scorer.watches(s.site)) for s in stages] == [[6], [6, 7, 8], [6, 7, 8, 9, 10, 11]]
    # in a stage written by hand
    assert [list(TransPrune(since=n).watches(Site("layer", 7))) for n in (None, 5, 9)] == [[6], [5, 6], [6]]
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("signals", "asked", "watched"),
    [("both", [7, 9, 12], [6, 7, 8, 9, 10, 11]), ("ttv", [], [6, 7, 8, 9, 10, 11]), ("iga", [7, 9, 12], [])],
)
def test_only_signals_that_count_are_read(signals: Any, asked: list[int], watched: list[int]) -> None:
    plan = TransPrune(signals=signals).plan(LLAVA, Budget(None))
    assert [layer for layer, _ in plan.looks_ahead(LLAVA.entering, 576)] == sorted(asked_layers(plan)) == asked
    assert list(watched_transitions(plan)) == watched


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_positions_are_passed_on(positions: Any) -> None:
    assert {s.positions for s in TransPrune(positions=positions).plan(LLAVA, Budget(300)).stages} == {positions}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"signals": "all"}, "signals must be 'both', 'ttv' or 'iga', got 'all'"),
        ({"direction": "up"}, "direction must be 'signed' or 'absolute'"),
        ({"positions": "shift"}, "positions must be 'keep' or 'compact', got 'shift'"),
        ({"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"alpha": True}, "alpha must be a number"),
        ({"alpha": "0.5"}, "alpha must be a number"),
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios must fall from below 1 to above 0"),
        ({"ratios": (1.0, 0.5)}, "ratios must fall"),
        ({"ratios": (0.5, 0.0)}, "ratios must fall"),
        ({"ratios": ()}, "ratios must fall"),
        ({"layers": (7, 9)}, "layers must be 3 increasing numbers"),
        ({"layers": (0, 9, 12)}, "layers must be 3 increasing numbers"),
        ({"since": -1}, "since must be a layer >= 0"),
        ({"since": True}, "since must be a layer >= 0 or None, got True"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TransPrune(**knobs)


@pytest.mark.parametrize(
    ("knobs", "depth", "message"),
    [
        ({"layers": (7, 9, 32)}, 32, r"needs 3 layers below 32 \(the decoder's\), got \(7, 9, 32\)"),
        ({}, 3, r"needs 3 layers below 3 \(the decoder's\), got \(1, 2, 2\)"),
        ({"ratios": (0.5, 0.1)}, 32, r"needs 2 layers below 32 \(the decoder's\), got \(7, 9, 12\)"),
    ],
)
def test_layers_that_the_model_or_the_ratios_do_not_have(knobs: dict[str, Any], depth: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TransPrune(**knobs).plan(dataclasses.replace(LLAVA, layers=depth, entering=()), Budget(0.9))


# signals, by hand


def by_hand(case: Any, inputs: dict[str, Any], cut: int, since: int) -> list[tuple[Tensor, Tensor]]:
    """For each sample (TTV, IGA) of its visual tokens, from an unpruned run in eager attention."""
    model, calls = case.model("eager"), {}
    text = model.model.language_model

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            calls[name] = before, output[0] if isinstance(output, tuple) else output

        return hook

    for i in range(since, cut):
        text.layers[i].self_attn.register_forward_hook(note(f"{i}a"), with_kwargs=True)
        text.layers[i].mlp.register_forward_hook(note(f"{i}m"), with_kwargs=True)
    attention = model(**inputs, output_attentions=True).attentions[cut]
    visual, found = case.visual(inputs["input_ids"]), []
    # keys of an earlier turn lie in front
    past = inputs["attention_mask"].shape[1] - visual.shape[1]
    for b in range(len(visual)):
        real, at = inputs["attention_mask"][b, past:].bool(), visual[b].nonzero()[:, 0]
        ttv = torch.zeros(len(real))
        for before, after in calls.values():
            x, y = before[b], after[b]
            turn = (1 - torch.cosine_similarity(x, y, dim=-1)).exp()
            ttv += y.norm(dim=-1) / x.norm(dim=-1) * turn / turn[real].sum()
        rows = torch.arange(int(at[-1]) + 1, len(real))
        rows = rows[real[rows]]
        found.append((ttv[at], attention[b].mean(0)[rows][:, past + at].mean(0)))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma2"])
@torch.no_grad()
def test_scores_equal_the_formula_by_hand(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged in every way: positions, visual tokens and tokens that ask, of which a few at a time are looked at."""
    monkeypatch.setattr(instruction, "_ROWS", 20)
    case = CASES[name]
    rows = (
        Row((("image", case.sizes[0]),), 1, 30, 0),
        Row((("image", case.sizes[1]), ("image", case.sizes[2])), 1, 2, 1),
    )
    inputs = case.batch(*rows)
    scores = {}
    for knobs in ({}, {"signals": "ttv"}, {"signals": "iga"}, {"alpha": 0.9}, {"normalise": False}, {"since": 0}):
        method = TransPrune(layers=(2, 3), ratios=(0.6, 0.3), positions="keep", **knobs)  # type: ignore[arg-type]
        model = case.model(attention)
        with vtprune.prune(model, method, record_scores=True) as session:
            model(**inputs)
            scores[str(knobs)] = session.report.kept[0].scores
    for b, (ttv, iga) in enumerate(by_hand(case, inputs, 2, 1)):
        a, c = ttv / ttv.sum(), iga / iga.sum()
        longer = by_hand(case, inputs, 2, 0)[b][0]
        want = {
            "{}": (a + c) / 2,
            "{'signals': 'ttv'}": a,
            "{'signals': 'iga'}": c,
            "{'alpha': 0.9}": 0.9 * a + 0.1 * c,
            "{'normalise': False}": (ttv + iga) / 2,
            "{'since': 0}": (longer / longer.sum() + c) / 2,
        }
        for knobs, score in want.items():
            said = functools.partial("{}: {}".format, knobs)
            torch.testing.assert_close(scores[knobs][b], score, rtol=1e-4, atol=1e-6, msg=said)


@torch.no_grad()
def test_padding_behind_a_prompt_asks_nothing() -> None:
    case = CASES["llava"]
    inputs = case.batch(Row((("image", None),), 1, 3, 0), Row((("image", None),), 1, 9, 1), left=False)
    model = case.model()
    with vtprune.prune(model, TransPrune(layers=(2,), ratios=(0.5,)), record_scores=True) as session:
        model(**inputs)
        scores = session.report.kept[0].scores
    assert scores is not None
    for score, (ttv, iga) in zip(scores, by_hand(case, inputs, 2, 1), strict=True):
        torch.testing.assert_close(score, (ttv / ttv.sum() + iga / iga.sum()) / 2, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Keeps(Scorer):
    """Keeps what it is told."""

    name: ClassVar[str] = "keeps"

    tokens: tuple[int, ...] = ()

    def score(self, view: TokenView) -> Tensor:
        return torch.isin(view.original, torch.tensor(self.tokens)).float()


@torch.no_grad()
def test_a_pass_that_is_broken_off_is_asked_in_its_own_layer_and_leaves_no_transitions() -> None:
    """Layer 1 is asked and watched too, but not in the pass up to layer 2."""
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(Row((("image", None),)))
    with vtprune.prune(model, vtprune.GemFilter(layer=2), 9, basis="final") as session:
        model(**inputs)
        (alone,) = session.report.kept
    asks = TransPrune(layers=(1, 2), ratios=(0.6, 0.3), since=0)
    later = [Stage(Site("layer", 1), asks, 6), Stage(Site("layer", 2), asks, 3)]
    kept = []
    for first in (
        Stage(Site("restart", 2), vtprune.GemFilter(layer=2), 9),
        Stage(Site("input"), Keeps(tuple(alone.indices[0].tolist())), 9),
    ):
        with vtprune.prune(model, Plan((first, *later)), record_scores=True) as session:
            model(**inputs)
            kept.append(session.report.kept)
    assert torch.equal(kept[0][0].indices[0], alone.indices[0])
    for mine, want in zip(kept[0][1:], kept[1][1:], strict=True):
        assert torch.equal(mine.indices[0], want.indices[0])
        torch.testing.assert_close(mine.scores, want.scores, rtol=1e-5, atol=1e-6)


def test_signals_are_no_part_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    case, graphs = CASES["llava"], []
    observe = TransPrune.observe_transition

    def note(self: TransPrune, view: Any, memory: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return observe(self, view, memory)

    monkeypatch.setattr(TransPrune, "observe_transition", note)
    model = case.model()
    with vtprune.prune(model, TransPrune(layers=(2,), ratios=(0.5,))):
        model(**case.batch(Row((("image", None),))))
    assert graphs == [False, False]


@torch.no_grad()
def test_scores_of_a_later_turn_equal_the_formula_by_hand() -> None:
    case = CASES["llava"]
    model, first = case.model(), case.batch(Row((), 7, 0, 5))
    turn = case.batch(Row((("image", None),), 2, 5, 1))
    turn["attention_mask"] = torch.cat([first["attention_mask"], turn["attention_mask"]], 1)
    with vtprune.prune(model, TransPrune(layers=(2,), ratios=(0.5,)), record_scores=True) as session:
        cache = model(**turn, past_key_values=model(**first).past_key_values).past_key_values
        scores = session.report.kept[0].scores
    ((ttv, iga),) = by_hand(case, {**turn, "past_key_values": case.model("eager")(**first).past_key_values}, 2, 1)
    assert scores is not None
    # the books hold no trace of the layer that was asked
    assert [group.first for group in record_of(cache).groups] == [0, 2]  # type: ignore[union-attr]
    torch.testing.assert_close(scores[0], (ttv / ttv.sum() + iga / iga.sum()) / 2, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_later_cuts_remember_transitions_and_ask_the_shortened_prompt() -> None:
    """The second cut: transitions of all layers since, attention among the tokens that the first cut left."""
    case = CASES["llava"]
    inputs = case.batch(Row((("image", None),)))
    model = case.model()
    kept = {}
    for name, ratios in (("both", (0.6, 0.3)), ("first", (0.6,))):
        method = TransPrune(layers=(1, 3)[: len(ratios)], ratios=ratios, positions="keep")
        with vtprune.prune(model, method, record_scores=True) as session:
            model(**inputs)
            kept[name] = session.report.kept
    left = kept["first"][0].indices[0]
    assert torch.equal(kept["both"][0].indices[0], left)
    assert torch.equal(kept["both"][1].alive[0], left)
    # hide what the first cut dropped from layer 1 on, and read the rest off the unpruned model
    with vtprune.prune(model, TransPrune(layers=(1,), ratios=(0.6,), positions="keep")) as session:
        model(**inputs)
        report = session.report
    eager = case.model("eager")
    with masked(eager, hidden_keys(report, inputs["input_ids"], LAYERS)):
        seen = by_hand_masked(case, eager, inputs, left)
    torch.testing.assert_close(kept["both"][1].scores[0], seen, rtol=1e-4, atol=1e-6)


def by_hand_masked(case: Any, model: Any, inputs: dict[str, Any], left: Tensor) -> Tensor:
    """Score at layer 3 of the tokens `left` by a cut before layer 1; transitions since layer 0."""
    calls = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output))

    layers = model.model.language_model.layers
    handles = [
        m.register_forward_hook(note, with_kwargs=True) for i in range(3) for m in (layers[i].self_attn, layers[i].mlp)
    ]
    attention = model(**inputs, output_attentions=True).attentions[3][0].mean(0)
    for handle in handles:
        handle.remove()
    at = case.visual(inputs["input_ids"])[0].nonzero()[:, 0]
    gone = torch.ones(len(at), dtype=torch.bool)
    gone[left] = False
    ttv = torch.zeros(inputs["input_ids"].shape[1])
    for number, (before, after) in enumerate(calls):
        here = torch.ones(len(ttv), dtype=torch.bool)
        if number >= 2:  # layers 1 and 2 run without what left
            here[at[gone]] = False
        x, y = before[0], after[0]
        turn = (1 - torch.cosine_similarity(x, y, dim=-1)).exp()
        ttv += y.norm(dim=-1) / x.norm(dim=-1) * turn / turn[here].sum()
    rows = torch.arange(int(at[-1]) + 1, len(ttv))
    a, c = ttv[at[left]], attention[rows][:, at[left]].mean(0)
    return (a / a.sum() + c / c.sum()) / 2
