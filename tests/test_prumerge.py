"""PruMerge and its merge, in which one token goes into several: by hand, by slow plain rules, and in the models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CASES
from family_models import Row as Media
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, same_scores
from scorer_views import HEAD_DIM, HEADS, LLAVA, WIDTH, Sample, attention_view, seen
from test_remainders import alive_of, merged, own, states_of
from test_rules import EXACT, GREEDY, RAGGED
from test_selections import SAMPLES, plane, view_of
from torch import Tensor

import vtprune
from vtprune import similarity
from vtprune.budget import Budget
from vtprune.errors import BudgetError, PlanError, UnsupportedModelError
from vtprune.plan import Plan, Site, Stage
from vtprune.remainders.neighbours import Neighbours
from vtprune.scorers.fastervlm import FasterVLM
from vtprune.scorers.prumerge import PruMerge, PruMergePlus, outliers, single_head
from vtprune.scorers.tower_end import received_attention
from vtprune.similarity import nearest_others, unit_states

LAST = 5
ROWS = (Row(1, 3, 5, 0), Row(0, 2, 9, 2), Row(2, 1, 4, 1))
METHODS = {"prumerge": PruMerge, "prumerge-plus": PruMergePlus}


def taken_in(states: Tensor, metric: Tensor, scores: Tensor, selected: list[int], k: int) -> tuple[int, Tensor]:
    """The rule one token at a time, of one picture [V, D]: the place of the sum, and states with sums in place."""
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    rest = [j for j in range(len(states)) if j not in selected]
    place, out = max(rest, key=lambda j: float(scores[j])), states.clone()
    for i in selected:
        others = sorted((j for j in range(len(states)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        out[i] = states[i] + sum(scores[j] * states[j] for j in others[:k])
    out[place] = sum(scores[j] * states[j] for j in rest)
    return place, out


# the merge


def test_on_four_tokens_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(3,))
    view = dataclasses.replace(view, hidden=plane(0, 10, 90, 100))
    scores, x = torch.tensor([[0.1, 0.4, 0.3, 0.2]]), view.hidden[0]
    # 10 and 90 degrees stay, and of the rest 100 stands for itself and 0
    merge = merged(Neighbours(k=1), view, scores)
    assert merge.kept.tolist() == [[False, True, True, True]]
    assert merge.owner.tolist() == [[3, 1, 2, 3]]
    out = states_of(view, merge)[0]
    # the first and the last token go into two each
    torch.testing.assert_close(out[1], x[1] + 0.1 * x[0])
    torch.testing.assert_close(out[2], x[2] + 0.2 * x[3])
    torch.testing.assert_close(out[3], 0.1 * x[0] + 0.2 * x[3])
    # sizes go by the owner, and still add up to four
    assert alive_of(view).absorb(merge.owner).keep(merge.kept, [3])[0].size.tolist() == [[1.0, 1.0, 2.0]]
    # two neighbours each: survivors are neighbours too, with what they were before the merge
    out = states_of(view, merged(Neighbours(k=2), view, scores))[0]
    torch.testing.assert_close(out[1], x[1] + 0.1 * x[0] + 0.3 * x[2])
    torch.testing.assert_close(out[2], x[2] + 0.2 * x[3] + 0.4 * x[1])
    # more neighbours than tokens
    out = states_of(view, merged(Neighbours(k=9), view, scores))[0]
    torch.testing.assert_close(out[1], x[1] + 0.1 * x[0] + 0.3 * x[2] + 0.2 * x[3])
    # by what the method remembers, there 0 and 90 lie together
    known = dataclasses.replace(view, memory={"metric": plane(90, 10, 90, 170)})
    out = states_of(known, merged(Neighbours(k=1), known, scores))[0]
    torch.testing.assert_close(out[2], x[2] + 0.1 * x[0])
    # one token: the sum of all
    one = dataclasses.replace(view, keep=torch.tensor([1]))
    merge = merged(Neighbours(k=1), one, scores)
    assert merge.kept.tolist() == [[False, True, False, False]]
    torch.testing.assert_close(states_of(one, merge)[0, 1], (scores[0, :, None] * x).sum(0))
    # negative and missing scores weigh nothing
    odd = torch.tensor([[-1.0, 0.4, 0.3, math.nan]])
    torch.testing.assert_close(states_of(view, merged(Neighbours(k=2), view, odd))[0, 1], x[1] + 0.3 * x[2])


@pytest.mark.parametrize("block", [1 << 22, 40])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_merge_equals_the_rule(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", block)
    keep = (5, 7, 1, 6)
    view, scores = view_of(*SAMPLES, keep=keep)
    merge = merged(Neighbours(k=k), view, scores)
    out = states_of(view, merge)
    for b, sample in enumerate(SAMPLES):
        n = len(sample.alive)
        if n <= keep[b]:
            assert torch.equal(out[b, :n], view.hidden[b, :n])
            continue
        selected = scores[b, :n].argsort(descending=True)[: keep[b] - 1].tolist()
        place, want = taken_in(view.hidden[b, :n], view.hidden[b, :n], scores[b, :n], selected, k)
        assert sorted([*selected, place]) == merge.kept[b].nonzero()[:, 0].tolist()
        torch.testing.assert_close(out[b, :n], want)
    half = dataclasses.replace(view, hidden=view.hidden.bfloat16())
    torch.testing.assert_close(states_of(half, merge).float()[view.valid], out[view.valid], atol=0.05, rtol=0.02)


def test_nearest_others_finds_the_earlier_of_twins_and_never_itself() -> None:
    view, _ = view_of(Sample(((1, 6),)), Sample(((1, 2),)), keep=(3, 1))
    states = torch.cat([plane(0, 0, 0, 50, 55, 0), plane(10, 20, 0, 0, 0, 0)])
    rows = torch.tensor([[True, False, True, True, False, False], [False, True, False, False, False, False]])
    near, there = nearest_others(unit_states(states, view.valid), rows, view.valid, 3)
    assert near[0, [0, 2, 3]].tolist() == [[1, 2, 5], [0, 1, 5], [4, 0, 1]]
    assert near[1, 1].tolist() == [0, 1, 1]
    assert there[1, 1].tolist() == [True, False, False]
    assert torch.equal(near[~rows], own(view.valid)[~rows][:, None].expand(-1, 3))
    assert not there[~rows].any()
    nobody = nearest_others(unit_states(states, view.valid), torch.zeros_like(rows), view.valid, 3)
    assert torch.equal(nobody[0], own(view.valid)[..., None].expand(-1, -1, 3))


def test_gradients_flow_into_everything_that_is_taken_in() -> None:
    view, scores = view_of(*SAMPLES, keep=(5, 7, 1, 6))
    merge = merged(Neighbours(k=3), view, scores)
    hidden = view.hidden.masked_fill(~view.valid[..., None], 0.0).requires_grad_()
    states_of(dataclasses.replace(view, hidden=hidden), merge)[merge.kept].square().sum().backward()
    leaf = hidden.detach().clone().requires_grad_()
    total = torch.zeros(())
    for b, sample in enumerate(SAMPLES):
        n, keep = len(sample.alive), (5, 7, 1, 6)[b]
        selected = scores[b, :n].argsort(descending=True)[: keep - (n > keep)].tolist()
        if n > keep:
            place, out = taken_in(leaf[b, :n], leaf[b, :n].detach(), scores[b, :n], selected, 3)
            total = total + out[[*selected, place]].square().sum()
        else:
            total = total + leaf[b, :n].square().sum()
    total.backward()
    torch.testing.assert_close(hidden.grad, leaf.grad)
    with pytest.raises(PlanError, match="neighbours k must be an int >= 1, got 0"):
        Neighbours(k=0)


@torch.no_grad()
def test_between_layers_it_equals_the_same_sums_in_the_unpruned_model() -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, "fastv(layer=1)/neighbours(k=3)", 0.5, record_scores=True) as session:
        logits, report = model(**inputs).logits, session.report
        out = model.generate(**inputs, **GREEDY)
    (record,) = report.kept
    visual, hidden = inputs["input_ids"] == IMAGE, hidden_keys(report, inputs["input_ids"], LAYERS)
    layer = model.model.language_model.layers[record.site.index]

    def summed(module: Any, args: tuple, kwargs: dict) -> tuple:
        states = args[0].clone()
        if states.shape[1] < visual.shape[1]:
            return args, kwargs  # a decode step
        for b, scores in enumerate(record.scores):
            if len(scores):
                mine, keep = states[b, visual[b]], len(record.indices[b])
                selected = scores.argsort(descending=True)[: keep - 1].tolist()
                place, states[b, visual[b]] = taken_in(mine, mine, scores, selected, 3)
                assert record.indices[b].tolist() == sorted([*selected, place])
                assert set(record.merged[b][1].tolist()) == {place}
        return (states, *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(summed, with_kwargs=True)
    with masked(model, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    handle.remove()
    seen_rows = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen_rows], want[seen_rows], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    same_scores(out, ref)
    with masked(model, hidden):
        assert (model(**inputs).logits[seen_rows] - logits[seen_rows]).abs().max() > 1e-2


@pytest.mark.parametrize("block", [2, LAST])
@torch.no_grad()
def test_in_the_tower_it_equals_the_same_sums_in_the_unpruned_tower(block: int) -> None:
    model, inputs = llava(), batch(*ROWS)
    plan = Plan((Stage(Site("vision", block), FasterVLM(), 0.4, remainder=Neighbours(k=3)),))
    with vtprune.prune(model, plan, record_scores=True) as session:
        logits, report = model(**inputs).logits, session.report
    (record,) = report.kept
    images = [(b, i * TOKENS) for b, row in enumerate(ROWS) for i in range(row.images)]
    lost = torch.zeros(len(images), 1 + TOKENS, dtype=torch.bool)
    handles, blocks = [], model.model.vision_tower.encoder.layers

    def summed(states: Tensor, lead: int) -> Tensor:
        states = states.clone()
        for image, (b, start) in enumerate(images):
            kept = [int(k) - start for k in record.indices[b] if 0 <= k - start < TOKENS]
            scores = record.scores[b][start : start + TOKENS]
            selected = scores.argsort(descending=True)[: len(kept) - 1].tolist()
            mine = states[image, lead:].clone()
            place, states[image, lead:] = taken_in(mine, mine, scores, selected, 3)
            assert kept == sorted([*selected, place])
            lost[image, 1:] = ~torch.isin(torch.arange(TOKENS), torch.tensor(kept))
        return states

    def on_block(module: Any, args: tuple, kwargs: dict) -> tuple:
        states = summed(args[0], 1) if module is blocks[block + 1] else args[0]
        mask = torch.zeros(lost.shape).masked_fill(lost, torch.finfo(torch.float32).min)[:, None, None]
        return (states, mask.expand(-1, 1, 1 + TOKENS, -1), *args[2:]), kwargs

    if block < LAST:
        handles += [layer.register_forward_pre_hook(on_block, with_kwargs=True) for layer in blocks[block + 1 :]]
    else:
        projector = model.model.multi_modal_projector
        handles.append(projector.register_forward_pre_hook(lambda m, a: (summed(a[0], 0),)))
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
    for handle in handles:
        handle.remove()
    seen_rows = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen_rows], want[seen_rows], **EXACT)


# who stands out


def test_outliers_by_hand() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    # quartiles of 1, 1, 1, 9: 1 and 3, so the fence is 3 + 1.5 * 2 = 6
    assert outliers(torch.tensor([[1.0, 9.0, 1.0, 1.0]]), valid).tolist() == [1]
    # of 1, 2, 3, 4: 1.75 and 3.25, the fence is 5.5
    assert outliers(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), valid).tolist() == [0]
    # 0 to 7 and one more: quartiles 2 and 6, the fence is 12
    nine = torch.arange(9.0).expand(2, 9).clone()
    nine[:, 8] = torch.tensor([11.9, 12.2])
    assert outliers(nine, torch.ones(2, 9, dtype=torch.bool)).tolist() == [0, 1]
    # all alike but for the last bits: the fence lies on them, and nobody stands out
    flat = torch.full((1, 4), 0.25) + torch.tensor([[0.0, 2e-8, 0.0, 0.0]])
    assert outliers(flat, valid).tolist() == [0]
    assert outliers(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0, 0]


def test_outliers_equal_the_percentiles() -> None:
    counts, scores = (1, 2, 5, 23, 40), torch.full((5, 40), math.nan)
    for b, n in enumerate(counts):
        scores[b, :n] = Sample(((1, n),), seed=b).normal("score", n).exp().square()
    valid = torch.arange(40) < torch.tensor(counts)[:, None]
    want = []
    for b, n in enumerate(counts):
        first, third = np.percentile(scores[b, :n].double().numpy(), [25, 75])
        want.append(int((scores[b, :n] > third + 1.5 * (third - first)).sum()))
    assert outliers(scores, valid).tolist() == want
    assert want[3] > 0 < want[4]


@pytest.mark.parametrize("has_cls", [True, False])
def test_one_head_as_wide_as_all(has_cls: bool) -> None:
    samples = (Sample(((3, 4),), seed=1), Sample(((2, 2),), seed=2))
    view = attention_view(samples, has_cls=has_cls)
    got = received_attention(single_head(view), impl="torch")
    for b, sample in enumerate(samples):
        n = len(sample.alive)
        here = view.real[b].nonzero()[:, 0]
        key = view.key[b][:, here].repeat_interleave(HEADS // 2, 0).transpose(0, 1).flatten(1)
        asking = view.query[b] if has_cls else view.every_query[b][:, here]
        logits = asking.transpose(0, 1).flatten(1) @ key.T / math.sqrt(HEADS * HEAD_DIM)
        weights = logits.softmax(-1).mean(0)
        torch.testing.assert_close(got[b, :n], weights[1 : 1 + n] if has_cls else weights[:n])


def above_the_fence(attention: Tensor) -> list[int]:
    """What PruMerge keeps by itself."""
    first, third = np.percentile(attention.double().numpy(), [25, 75])
    return (attention > third + 1.5 * (third - first)).nonzero()[:, 0].tolist()


def strides(attention: Tensor) -> list[int]:
    """What PruMerge+ keeps by itself, as the paper's authors count it."""
    number, best = len(attention), above_the_fence(attention)
    step = int(number / max(1, len(best)))
    return sorted({*best, *range(0, number - 1, max(1, int(step / 3)))})


def halves(attention: Tensor, keep: int) -> list[int]:
    """What PruMerge+ keeps of a budget: half by attention, and the others in the middle of even runs of the rest."""
    best = attention.argsort(descending=True).tolist()[: math.ceil(keep / 2)]
    rest, number = [i for i in range(len(attention)) if i not in best], keep // 2
    return sorted([*best, *(rest[int((i + 0.5) * len(rest) / number)] for i in range(number))])


@pytest.mark.parametrize("size", [(5, 7), (3, 3), (6, 4), (1, 2)])
def test_plus_adds_a_stride(size: tuple[int, int]) -> None:
    sample = Sample((size,), seed=4)
    view = seen(PruMergePlus(), (sample,), (1,))
    attention = view.memory["attention"][0].square()
    view = dataclasses.replace(view, memory={**view.memory, "attention": attention[None]})
    rule, number = PruMergePlus(), len(attention)
    mine = strides(attention)
    assert rule.count(view).tolist() == [len(mine) + 1]
    for keep in range(1, number + 1):
        kept = rule.select(dataclasses.replace(view, keep=torch.tensor([keep])))[0].nonzero()[:, 0].tolist()
        assert kept == (mine if keep == len(mine) else halves(attention, keep))
    assert not rule.select(dataclasses.replace(view, keep=torch.tensor([0]))).any()


# in the models

# the sets of 8 of 16 and of no budget, the sum of the rest left out
SETS: dict[tuple[str, float | None], Callable[[Tensor], list[int]]] = {
    ("prumerge", None): above_the_fence,
    ("prumerge", 0.5): lambda attention: attention.argsort(descending=True)[:7].tolist(),
    ("prumerge-plus", None): strides,
    ("prumerge-plus", 0.5): lambda attention: halves(attention, 7),
}


def look(model: Any, pixels: Tensor, has_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Full-width attention [images, TOKENS], keys and features [images, TOKENS, W] of the block that is read."""
    block, got = model.model.vision_tower.encoder.layers[LAST], {}

    def pre(module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        got["query"], got["key"] = module.q_proj(states), module.k_proj(states)

    handles = [
        block.self_attn.register_forward_pre_hook(pre, with_kwargs=True),
        block.register_forward_hook(lambda m, a, out: got.update(features=out)),
    ]
    model.get_image_features(pixels)
    for handle in handles:
        handle.remove()
    weights = (got["query"] @ got["key"].transpose(1, 2) / math.sqrt(got["query"].shape[-1])).softmax(-1)
    lead = int(has_cls)
    return weights[:, 0, 1:] if has_cls else weights.mean(1), got["key"][:, lead:], got["features"][:, lead:]


def sharp(tower: str) -> Any:
    """A model whose attention is peaked enough for patches to stand out."""
    model = llava("sdpa", tower)
    attention = model.model.vision_tower.encoder.layers[LAST].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(3.0)
        attention.k_proj.weight.mul_(3.0)
    return model


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_it_is_what_the_formula_says(method: str, keep: float | None, tower: str) -> None:
    model, inputs = sharp(tower), batch(*ROWS)
    attention, keys, features = look(model, inputs["pixel_values"], tower == "clip")
    with vtprune.prune(model, METHODS[method](neighbours=4), keep) as session:
        logits, report = model(**inputs).logits, session.report
        model.generate(**inputs, max_new_tokens=2)
        again = session.report
    choose = SETS[method, keep]
    wanted, owners, mixed = [], [], features.clone()
    for image in range(3):
        selected = choose(attention[image])
        place, states = taken_in(features[image], keys[image], attention[image], selected, 4)
        if len(selected) + 1 < TOKENS:
            # where nothing leaves nothing is merged
            mixed[image] = states
        wanted.append(sorted([*selected, place]))
        owners.append([t if t in selected else place for t in range(TOKENS)])
    got = [report.kept[0].indices[b] for b in (0, 2)]
    assert got[0].tolist() == wanted[0]
    assert got[1].tolist() == wanted[1] + [t + TOKENS for t in wanted[2]]
    assert report.owners(0).tolist() == owners[0]
    assert report.owners(2).tolist() == owners[1] + [t + TOKENS for t in owners[2]]
    assert all(torch.equal(a, b) for a, b in zip(again.kept[0].indices, report.kept[0].indices, strict=True))
    if keep is None:
        assert len({len(w) for w in wanted}) > 1, "the counts must differ from picture to picture"
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden, model.model.multi_modal_projector(mixed)):
        want = model(**inputs).logits
    seen_rows = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen_rows], want[seen_rows], **EXACT)
    with masked(model, hidden):
        assert (model(**inputs).logits[seen_rows] - logits[seen_rows]).abs().max() > 1e-3


@pytest.mark.parametrize("keep", [None, 0.4])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_next"])
@torch.no_grad()
def test_merged_cells_and_crops_know_no_batch_mates(name: str, keep: float | None) -> None:
    case = CASES[name]
    first, second, third = case.tower_sizes or case.sizes
    rows = (Media((("image", first),), 3, 5, 0), Media((("image", second), ("image", third)), 1, 4, 1))
    model = case.model()
    with vtprune.prune(model, "prumerge-plus", keep) as session:
        together, kept = model(**case.batch(*rows)).logits, session.report.kept[0]
        for b, row in enumerate(rows):
            alone = model(**case.batch(row)).logits[0]
            torch.testing.assert_close(together[b, -1], alone[-1], **EXACT)
            assert torch.equal(kept.indices[b], session.report.kept[0].indices[0])
            assert torch.equal(kept.merged[b], session.report.kept[0].merged[0])


# plans


@pytest.mark.parametrize("method", METHODS)
def test_plans(method: str) -> None:
    rule = METHODS[method]()
    (stage,) = rule.plan(LLAVA, Budget(None)).stages
    assert (stage.site, stage.adaptive, stage.count(576)) == (Site("vision", 22), True, 1)
    assert Plan.from_dict(rule.plan(LLAVA, Budget(None)).to_dict()) == rule.plan(LLAVA, Budget(None))
    (stage,) = rule.plan(LLAVA, Budget(64)).stages
    assert (stage.site, stage.adaptive, stage.keep) == (Site("vision", 22), False, 64)
    for budget in (Budget(None), Budget(64)):
        with pytest.raises(UnsupportedModelError, match=f"{method} chooses among the features of the vision tower"):
            rule.plan(dataclasses.replace(LLAVA, vision=None), budget)
    with pytest.raises(PlanError, match="neighbours k must be an int >= 1, got 0"):
        METHODS[method](neighbours=0)
    with pytest.raises(BudgetError, match=r"keep must be in \[1, 576\], got 577"):
        rule.plan(LLAVA, Budget(577))


@torch.no_grad()
def test_where_nothing_stands_out_one_token_is_the_sum_of_all() -> None:
    view = seen(PruMerge(), (Sample(((3, 3),), seed=1),), (1,))
    flat = {**view.memory, "attention": torch.full((1, 9), 1 / 9)}
    view = dataclasses.replace(view, memory=flat)
    assert PruMerge().count(view).tolist() == [1]
    merge = merged(Neighbours(), view, view.memory["attention"])
    torch.testing.assert_close(states_of(view, merge)[0, 0], view.hidden[0].mean(0))
    assert view.hidden.shape[2] == WIDTH
