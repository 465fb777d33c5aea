"""Rules in the engine: a merged token is what the unpruned model makes of the same mean; plans, texts and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CASES
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, same_scores
from PIL import Image
from test_family_towers import ragged
from torch import Tensor, nn
from tower_cases import NAMES as TOWERS
from tower_cases import blocks_of
from tower_oracle import gone, tower_masked

import vtprune
from vtprune.errors import PlanError, UnknownNameError
from vtprune.plan import Plan, Site, Stage
from vtprune.report import Report
from vtprune.specs import parse_chain, parse_method, with_seed

RAGGED = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2), Row(1, 6, 2, 3))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
EXACT = {"atol": 1e-5, "rtol": 1e-5}
DPP, Nearest, Summary, Recycle = vtprune.DPP, vtprune.Nearest, vtprune.Summary, vtprune.Recycle
FastV, Pool, Random = vtprune.FastV, vtprune.Pool, vtprune.Random


@contextmanager
def averaging(model: nn.Module, report: Report, visual: Tensor) -> Iterator[None]:
    """Write means over survivors before the layer of their cut, by what the report says was merged into them."""
    text, handles = model.model.language_model, []
    size = [torch.ones(int(row.sum())) for row in visual]

    def hook(record: Any) -> Any:
        def pre(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            states = args[0].clone()
            if states.shape[1] < visual.shape[1]:
                return args, kwargs  # a decode step
            for b, (token, into) in enumerate(record.merged):
                at = visual[b].nonzero()[:, 0]
                for kept in into.unique().tolist():
                    group = [kept, *token[into == kept].tolist()]
                    weight = size[b][group] / size[b][group].sum()
                    states[b, at[kept]] = (weight[:, None] * args[0][b, at[group]]).sum(0)
                    size[b][kept] = size[b][group].sum()
            return (states, *args[1:]), kwargs

        return pre

    for record in report.kept:
        if record.merged is not None:
            layer = text.layers[record.site.index if record.site.kind == "layer" else 0]
            handles.append(layer.register_forward_pre_hook(hook(record), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


MERGING = [
    ("fastv(layer=1)/nearest", 0.5),
    ("fastv(layer=2)/dpp/summary", 0.6),
    ("random/recycle(group=2)", 0.4),
    ("divprune/nearest", 3),
    (Plan((Stage(Site("input"), Random(), 0.6, remainder=Nearest()),
           Stage(Site("layer", 2), FastV(), 0.3, remainder=Summary()))), None),
    ("gemfilter(layer=1,positions='keep')/nearest", 0.6),
    ("sparsevlm(layers=(0,1,2))", 0.6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "keep"), MERGING, ids=lambda v: None if isinstance(v, (int, float)) else str(v)[:40]
)
@torch.no_grad()
def test_merging_equals_averaged_states_in_the_unpruned_model(method: Any, keep: Any) -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, method, keep) as session:
        logits, report = model(**inputs).logits, session.report
        out = model.generate(**inputs, **GREEDY)
    visual = inputs["input_ids"] == IMAGE
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    assert any(len(pair[0]) for record in report.kept for pair in record.merged)
    with masked(model, hidden), averaging(model, report, visual):
        want = model(**inputs).logits
    with masked(model, hidden), averaging(model, report, visual):
        ref = model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    same_scores(out, ref)
    with masked(model, hidden):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-2, "the oracle must notice when nothing is averaged"


@pytest.mark.parametrize(("method", "keep"), MERGING[:4], ids=[str(m) for m, _ in MERGING[:4]])
@torch.no_grad()
def test_merging_knows_no_batch_mates_and_counts_right(method: str, keep: Any) -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, method, keep) as session:
        together = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(together, again)
        out, report = model(**inputs, use_cache=True), session.report
        held = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
        assert held == report.kv_bytes < report.kv_bytes_full
        for b, row in enumerate(RAGGED):
            alone = model.generate(**batch(row), max_new_tokens=8, do_sample=False)
            assert torch.equal(together[b, -8:], alone[0, -8:])
            if row.images:
                assert torch.equal(report.kept[0].merged[b], session.report.kept[0].merged[0])


@pytest.mark.parametrize("method", ["fastv(layer=1)/nearest", "random/summary"])
def test_gradients_flow_through_merged_tokens(method: str) -> None:
    model, inputs = llava(), batch(Row())
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtprune.prune(model, method, 0.5) as session:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        report = session.report
    name = "model.multi_modal_projector.linear_1.weight"
    got = model.get_parameter(name).grad.clone()
    model.zero_grad()
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        with averaging(model, report, inputs["input_ids"] == IMAGE):
            want = model(**inputs, labels=labels, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(got, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_sum_is_no_mean() -> None:
    """`Merge.summed`: the weighted sum takes the survivor's place."""
    from dataclasses import dataclass
    from typing import ClassVar

    from vtprune.rules import Merge, Remainder

    @dataclass(frozen=True)
    class Add(Remainder):
        name: ClassVar[str] = "add"

        def merge(self, view: Any, selected: Tensor, scores: Tensor | None) -> Merge:
            owner = torch.arange(selected.shape[1]).expand_as(selected)
            return Merge(selected, owner.where(selected | ~view.valid, selected.int().argmax(1, keepdim=True)),
                         torch.full(selected.shape, 0.5).where(~selected, 1.0), summed=True)  # fmt: skip

    model, inputs = llava(), batch(Row())
    with vtprune.prune(model, Plan((Stage(Site("input"), Random(), 4, remainder=Add()),))) as session:
        logits, report = model(**inputs).logits, session.report
    kept = report.kept[0].indices[0]
    features = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    rest = [i for i in range(TOKENS) if i not in kept.tolist()]
    features[0, kept[0]] += features[0, rest].sum(0) / 2
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS), features):
        want = model(**inputs).logits
    seen = ~hidden_keys(report, inputs["input_ids"], LAYERS)[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)


# the tower


def late(scorer: Any, keep: Any, **rules: Any) -> Any:
    """A plan that cuts behind the block that the projector reads."""
    return lambda last: Plan((Stage(Site("vision", last), scorer, keep, **rules),))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_cut_behind_the_tower_hides_from_the_decoder_only(name: str) -> None:
    case = CASES[name]
    model, inputs = case.model(), case.batch(*ragged(case))
    last = vtprune.geometry(model).vision.feature_block
    with vtprune.prune(model, late(Random(), 0.4)(last)) as session:
        logits, forward = model(**inputs).logits, session.report
        out, report = model.generate(**inputs, max_new_tokens=4, do_sample=False), session.report
    assert all(torch.equal(a, b) for a, b in zip(report.kept[0].indices, forward.kept[0].indices, strict=True))
    visual = case.visual(inputs["input_ids"])
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, visual)
    if vtprune.geometry(model).deepstack:
        lost = gone(case, ragged(case), report, blocks_of(case)[0])
        with tower_masked(model, lost, blocks_of(case)[1]), masked(model, hidden):
            want = model(**inputs).logits
    else:
        with masked(model, hidden):
            want, ref = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, ref)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    with masked(model, [torch.roll(h, 1, dims=1) & visual for h in hidden]):
        assert (model(**inputs).logits[seen] - logits[seen]).abs().max() > 1e-3


@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("method", [Nearest(), Summary(), None], ids=["nearest", "summary", "pool"])
@torch.no_grad()
def test_merging_in_the_tower_equals_averaged_patches(method: Any, block: int) -> None:
    """Patches are averaged before the next block (before the projector behind the last), then hidden as keys."""
    rows = (Row(1, 3, 5, 0), Row(0, 2, 9, 2), Row(2, 1, 4, 1))
    model, inputs = llava(), batch(*rows)
    assert vtprune.geometry(model).vision.feature_block == 5
    scorer = Pool() if method is None else Random()
    with vtprune.prune(model, Plan((Stage(Site("vision", block), scorer, 0.4, remainder=method),))) as session:
        logits, forward = model(**inputs).logits, session.report
        model.generate(**inputs, max_new_tokens=2)
        report = session.report
    (record,) = report.kept
    assert all(torch.equal(a, b) for a, b in zip(record.merged, forward.kept[0].merged, strict=True))
    # images of all prompts in order, with what was merged in each
    images = [(b, i * TOKENS) for b, row in enumerate(rows) for i in range(row.images)]
    handles = []

    def averaged(states: Tensor, lead: int) -> Tensor:
        states, before = states.clone(), states
        for image, (b, start) in enumerate(images):
            token, into = record.merged[b] - start
            for kept in range(TOKENS):
                group = [lead + t for t in (kept, *token[into == kept].tolist())]
                states[image, lead + kept] = before[image, group].mean(0)
        return states

    def on_block(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        lost = torch.zeros(len(images), 1 + TOKENS, dtype=torch.bool)
        for image, (b, start) in enumerate(images):
            stay = [int(k) - start for k in record.indices[b] if 0 <= k - start < TOKENS]
            lost[image, 1:] = True
            lost[image, [1 + k for k in stay]] = False
        mask = torch.zeros(lost.shape).masked_fill(lost, torch.finfo(torch.float32).min)[:, None, None]
        mask = mask.expand(-1, 1, 1 + TOKENS, -1)
        states = averaged(args[0], 1) if module is tower[block + 1] else args[0]
        return (states, mask, *args[2:]), kwargs

    tower = model.model.vision_tower.encoder.layers
    if block < 5:
        for layer in tower[block + 1 :]:
            handles.append(layer.register_forward_pre_hook(on_block, with_kwargs=True))
    else:
        projector = model.model.multi_modal_projector
        handles.append(projector.register_forward_pre_hook(lambda m, a: (averaged(a[0], 0),)))
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
    for handle in handles:
        handle.remove()
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    sizes = [report.owners(b).bincount(minlength=1) for b in (0, 2)]
    assert all(int(s.sum()) == n for s, n in zip(sizes, (TOKENS, 2 * TOKENS), strict=True))


@pytest.mark.parametrize("name", ["internvl", "llava_next", "qwen2_5_vl", "mistral3"])
@torch.no_grad()
def test_merging_in_other_towers_knows_no_batch_mates_and_stays_in_its_picture(name: str) -> None:
    case = CASES[name]
    model, rows = case.model(), ragged(case)
    last = vtprune.geometry(model).vision.feature_block
    for block in (0, last):
        with vtprune.prune(model, late(Random(), 0.4, remainder=Nearest())(block)) as session:
            together, report = model(**case.batch(*rows)).logits, session.report
            layout = report.layout
            for b, row in enumerate(rows):
                alone = model(**case.batch(row)).logits[0]
                torch.testing.assert_close(together[b, -1], alone[-1], **EXACT)
                token, into = report.kept[0].merged[b]
                assert torch.equal(torch.isin(into, report.kept[0].indices[b]), torch.ones_like(into, dtype=torch.bool))
                assert torch.equal(layout.grid[b][token], layout.grid[b][into])
                assert len(token) + len(report.kept[0].indices[b]) == len(report.owners(b))
                if row.media:
                    assert torch.equal(report.kept[0].merged[b], session.report.kept[0].merged[0])


@torch.no_grad()
def test_merging_where_features_are_added_later_is_refused() -> None:
    model = CASES["qwen3_vl"].model()
    for site, where in ((Site("vision", 1), r"vision\[1\]"), (Site("input"), "input")):
        with pytest.raises(PlanError, match=rf"random/nearest merges tokens at {where}, but this model adds visual"):
            vtprune.prune(model, Plan((Stage(site, Random(), 0.5, remainder=Nearest()),)))


# reports


def test_owners_and_sizes() -> None:
    kept = (
        vtprune.report.Kept(Site("input"), (torch.tensor([0, 2, 3]),), merged=(torch.tensor([[1, 4], [0, 3]]),)),
        vtprune.report.Kept(Site("layer", 1), (torch.tensor([0, 2]),), merged=(torch.tensor([[3], [0]]),)),
        vtprune.report.Kept(Site("layer", 2), (torch.tensor([0]),)),
    )
    report = Report((6,), (1,), ((6,),), (1,), kept, 1, 1, 0, 0, 1, 1)
    assert report.owners(stage=0).tolist() == [0, 0, 2, 3, 3, -1]
    assert report.owners(stage=1).tolist() == report.owners(stage=-2).tolist() == [0, 0, 2, 0, 0, -1]
    assert report.owners().tolist() == [0, 0, -1, 0, 0, -1]
    assert report.to_dict()["kept"][0]["merged"] == [[[1, 4], [0, 3]]]
    assert "merged" not in report.to_dict()["kept"][2]
    with pytest.raises(vtprune.InputError, match=r"had 1 sample\(s\), got sample=1"):
        report.owners(1)
    with pytest.raises(vtprune.InputError, match="one of the 3 that ran, got 3"):
        report.owners(stage=3)


@torch.no_grad()
def test_merged_tokens_are_drawn_between_kept_and_dropped() -> None:
    model, inputs = llava(), batch(Row())
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    with vtprune.prune(model, "random/recycle(group=2)", 5) as session:
        model(**inputs)
        owners = session.report.owners().view(4, 4)
        (drawing,) = vtprune.draw_kept(session.report, [red])
    pixels = np.asarray(drawing.picture)[5::10, 5::10].astype(int)
    shown = {}
    for row in range(4):
        for col in range(4):
            owner = int(owners[row, col])
            state = "dropped" if owner < 0 else "kept" if owner == 4 * row + col else "merged"
            shown.setdefault(state, set()).add(tuple(pixels[row, col]))
    assert set(shown) == {"dropped", "kept", "merged"}
    assert shown["kept"] == {(200, 30, 30)}
    assert all(len(colours) == 1 for colours in shown.values())
    assert len(set.union(*shown.values())) == 3


@torch.no_grad()
def test_merging_is_not_replayed() -> None:
    model, inputs = llava(), batch(Row())
    with vtprune.prune(model, "random/dpp/nearest", 5) as session:
        model(**inputs)
        with pytest.raises(PlanError, match="random/nearest merges tokens at input, and a replay can only keep and"):
            vtprune.replay(session.plan, session.report.kept)
    with vtprune.prune(model, "fastv/dpp", 7) as session:
        logits, plan = model(**inputs).logits, vtprune.replay(session.plan, session.report.kept)
    with vtprune.prune(model, plan):
        assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_merging_between_layers_is_not_verified_by_hiding() -> None:
    model, inputs = llava(), batch(Row())
    assert vtprune.verify(model, inputs, "random/nearest", 0.5).exact
    with pytest.raises(vtprune.UnsupportedModelError, match=r"fastv merges tokens at layer\[\d\], which hiding cannot"):
        vtprune.verify(model, inputs, "fastv/nearest", 0.7)


# plans and texts


def test_stages_with_rules_survive_json(tmp_path: Any) -> None:
    stage = Stage(Site("layer", 2), FastV(), 0.5, selection=DPP(theta=0.5), remainder=Recycle(group=4))
    plan = Plan((Stage(Site("input"), Random(), 0.7), stage))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert set(plan.to_dict()["stages"][0]) == {"site", "scorer", "keep", "adaptive", "positions"}
    broken = stage.to_dict()
    broken["remainder"]["tempo"] = 3
    with pytest.raises(PlanError, match=r"recycle has the knobs .* got \['tempo'\] beside them"):
        Stage.from_dict(broken)
    with pytest.raises(UnknownNameError, match=r"Unknown selection 'ddp'\. Did you mean 'dpp'"):
        Stage.from_dict({**stage.to_dict(), "selection": {"name": "ddp"}})


def test_an_adaptive_selection_needs_an_adaptive_stage() -> None:
    with pytest.raises(PlanError, match=r"selection threshold decides itself .* set adaptive=True .* its keep=3 is"):
        Stage(Site("layer", 2), FastV(), 3, selection=vtprune.Threshold())


def test_methods_with_rules_as_text() -> None:
    method = parse_method("fastv(layer=3) / strata(by='window', rows=2)/ nearest")
    assert method == vtprune.Recipe(FastV(layer=3), vtprune.Strata(by="window", rows=2), Nearest())
    assert method.name == "fastv/strata/nearest"
    assert parse_method("flowcut/summary") == vtprune.Recipe(vtprune.FlowCut(), None, Summary())
    chain = parse_chain("flowcut/dpp@1/2+fastv/nearest")
    assert chain.methods == (vtprune.Recipe(vtprune.FlowCut(), DPP()), vtprune.Recipe(FastV(), None, Nearest()))
    assert chain.fixed == (0.5, None)
    assert with_seed("random/nearest@1/2+fastv", 3) == "random(seed=3)/nearest@1/2+fastv"
    with pytest.raises(PlanError, match="fastv/strata/nearest has its rules already"):
        vtprune.Recipe(method)
    with pytest.raises(PlanError, match="fastv/strata/nearest is a recipe"):
        method.to_dict()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fastv/nearst", UnknownNameError, "Unknown selection or remainder 'nearst'. Did you mean 'nearest'"),
        ("fastv/nearest/dpp", PlanError, "rules are written 'method/selection', .* got 'fastv/nearest/dpp'"),
        (
            "fastv/dpp/topk",
            PlanError,
            "got 'fastv/dpp/topk'. Selections: coverage, crops, dpp, frames, maxmin, pairs, strata, threshold, topk",
        ),
        ("fastv/", UnknownNameError, "Unknown selection or remainder ''"),
        ("fastv/dpp(3)", PlanError, "got 'dpp\\(3\\)'"),
        ("fastv/dpp(lambda=3)", PlanError, "got"),
        ("fastv/dpp(tempo=3)", PlanError, r"dpp has the knobs \['theta'\], got \['tempo'\]"),
    ],
)
def test_rules_that_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_method(text)


def test_names_of_selections_and_remainders_do_not_collide() -> None:
    from vtprune.rules import REMAINDERS, SELECTIONS

    assert not set(SELECTIONS) & set(REMAINDERS)


@torch.no_grad()
def test_flowcuts_score_a_dpp_and_the_rest_merged_is_a_plan() -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, "flowcut/dpp/nearest", 0.4) as session:
        logits, plan, report = model(**inputs).logits, session.plan, session.report
    assert all((s.selection, s.remainder) == (DPP(), Nearest()) for s in plan.stages)
    with vtprune.prune(model, Plan.from_dict(plan.to_dict())):
        assert torch.equal(model(**inputs).logits, logits)
    with vtprune.prune(model, "flowcut/dpp", 0.4) as session:
        assert not torch.equal(model(**inputs).logits, logits)
    assert [len(i) for i in report.kept[-1].indices] == [6, 12, 0, 6]
    assert all(int((report.owners(b) < 0).sum()) == 0 for b in range(4))


@torch.no_grad()
def test_a_threshold_decides_and_the_budget_is_the_least() -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, "fastv/threshold(at=0.9)") as session:
        model(**inputs)
        counts = [len(i) for i in session.report.kept[0].indices]
        assert session.plan.stages[0].adaptive
    assert 1 < counts[0] < TOKENS
    assert counts[2] == 0
    with vtprune.prune(model, "fastv/threshold(at=0.01)", 9) as session:
        model(**batch(RAGGED[0], RAGGED[3]))
        (stage,) = session.plan.stages
        assert [len(i) for i in session.report.kept[0].indices] == [stage.keep, stage.keep] == [7, 7]
