"""Remainders by themselves: examples worked by hand, slow plain references, and what all of them must do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scorer_views import WIDTH, Sample, token_view
from test_selections import KEEP, SAMPLES, plane, view_of
from torch import Tensor

from vtprune.choice import choose
from vtprune.contract import METHODS
from vtprune.errors import PlanError, UnknownNameError
from vtprune.hooks.alive import Alive, merge_states
from vtprune.plan import Site, Stage
from vtprune.remainders.contextual import Contextual
from vtprune.remainders.drop import Drop
from vtprune.remainders.nearest import Nearest
from vtprune.remainders.recycle import Recycle, density_peaks
from vtprune.remainders.summary import Summary
from vtprune.rules import REMAINDERS, Merge, Remainder, top_k_mask
from vtprune.scorers.uniform import Uniform
from vtprune.selections.max_min import MaxMin
from vtprune.views import TokenView

EVERY = [*(REMAINDERS[name]() for name in REMAINDERS), Summary(weights="score"), Recycle(group=2, share=0.9)]
every = pytest.mark.parametrize("remainder", EVERY, ids=str)


def merged(remainder: Remainder, view: TokenView, scores: Tensor) -> Merge:
    """What becomes of the best by score and the rest."""
    selected = top_k_mask(scores, view.keep - remainder.places(view), view.valid)
    return remainder.merge(view, selected, scores) if remainder.merges else Merge(selected, own(selected))


def own(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1]).expand_as(mask)


def alive_of(view: TokenView) -> Alive:
    return Alive(view.original, view.valid.sum(1).tolist(), size=view.size)


def states_of(view: TokenView, merge: Merge) -> Tensor:
    return merge_states(view.hidden, merge, alive_of(view))


@every
def test_counts_owners_and_no_batch_mates(remainder: Remainder) -> None:
    view, scores = view_of(*SAMPLES, keep=KEEP)
    merge = merged(remainder, view, scores)
    assert merge.kept.sum(1).tolist() == list(KEEP)
    assert not (merge.kept & ~view.valid).any()
    assert torch.equal(merge.owner[merge.kept], own(merge.kept)[merge.kept]), "what stays must own itself"
    elsewhere = merge.owner != own(merge.kept)
    assert merge.kept.gather(1, merge.owner)[elsewhere].all(), "what is merged must go into what stays"
    assert elsewhere.any() == remainder.merges
    out = states_of(view, merge)
    assert out[view.valid].isfinite().all()
    for b, (sample, keep) in enumerate(zip(SAMPLES, KEEP, strict=True)):
        one, mine = view_of(sample, keep=(keep,))
        alone, n = merged(remainder, one, mine), len(sample.alive)
        assert torch.equal(alone.kept[0], merge.kept[b, :n])
        assert torch.equal(alone.owner[0], merge.owner[b, :n])
        torch.testing.assert_close(states_of(one, alone)[0], out[b, :n])


@every
def test_keeping_everything_changes_nothing(remainder: Remainder) -> None:
    keep = tuple(len(s.alive) for s in SAMPLES)
    view, scores = view_of(*SAMPLES, keep=keep)
    merge = merged(remainder, view, scores)
    assert torch.equal(merge.kept, view.valid)
    assert torch.equal(states_of(view, merge)[view.valid], view.hidden[view.valid])
    assert remainder.places(view).tolist() == [0] * 4


@every
def test_one_token_and_none(remainder: Remainder) -> None:
    view, scores = view_of(*SAMPLES, keep=(1,) * 4)
    assert merged(remainder, view, scores).kept.sum(1).tolist() == [1] * 4
    none = dataclasses.replace(view, keep=torch.zeros(4, dtype=torch.long))
    assert not merged(remainder, none, scores).kept.any()
    empty, scores = view_of(SAMPLES[0], Sample(()), keep=(3, 0))
    assert merged(remainder, empty, scores).kept.sum(1).tolist() == [3, 0]


@every
def test_remainders_survive_json(remainder: Remainder) -> None:
    assert Remainder.from_dict(remainder.to_dict()) == remainder
    with pytest.raises(PlanError, match=rf"{remainder.name} has the knobs \[.*\], got \['tempo'\] beside them"):
        Remainder.from_dict({**remainder.to_dict(), "tempo": 1})
    assert REMAINDERS[remainder.name].summary


def test_unknown_remainder_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown remainder 'nearst'\. Did you mean 'nearest'\?"):
        Remainder.from_dict({"name": "nearst"})


# nearest


def test_nearest_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(2,))
    view = dataclasses.replace(view, hidden=plane(0, 20, 60, 90))
    merge = merged(Nearest(), view, torch.tensor([[2.0, 0.0, 0.0, 3.0]]))
    assert merge.owner.tolist() == [[0, 0, 3, 3]]
    out = states_of(view, merge)[0]
    torch.testing.assert_close(out[0], view.hidden[0, :2].mean(0))
    torch.testing.assert_close(out[3], view.hidden[0, 2:].mean(0))
    # tokens that stand for others already count as often
    sized = dataclasses.replace(view, size=torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    out = states_of(sized, merge)[0]
    torch.testing.assert_close(out[0], (3 * view.hidden[0, 0] + view.hidden[0, 1]) / 4)
    assert alive_of(sized).absorb(merge.owner).size.tolist() == [[4.0, 1.0, 1.0, 2.0]]
    # 45 degrees is as far from both: the earlier one
    tie = dataclasses.replace(view, hidden=plane(0, 45, 45, 90))
    assert merged(Nearest(), tie, torch.tensor([[2.0, 0.0, 0.0, 3.0]])).owner.tolist() == [[0, 0, 0, 3]]


def test_nearest_equals_the_formula() -> None:
    view, scores = view_of(Sample(((7, 9),), seed=5), keep=(11,))
    merge = merged(Nearest(), view, scores)
    kept = merge.kept[0].nonzero()[:, 0].tolist()
    unit = view.hidden[0].double() / view.hidden[0].double().norm(dim=1, keepdim=True)
    for token in range(63):
        want = token if token in kept else max(kept, key=lambda k: float(unit[token] @ unit[k]))
        assert merge.owner[0, token] == want
    out = states_of(view, merge)[0]
    for token in kept:
        torch.testing.assert_close(out[token], view.hidden[0, merge.owner[0] == token].mean(0))


# summary


def test_summary_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(2,))
    scores = torch.tensor([[1.0, 9.0, 3.0, 0.0]])
    merge = merged(Summary(), view, scores)
    # 9 stays, and the best of the rest, 3, stands for it
    assert merge.kept.tolist() == [[False, True, True, False]]
    assert merge.owner.tolist() == [[2, 1, 2, 2]]
    torch.testing.assert_close(states_of(view, merge)[0, 2], view.hidden[0, [0, 2, 3]].mean(0))
    weighted = states_of(view, merged(Summary(weights="score"), view, scores))[0, 2]
    torch.testing.assert_close(weighted, (view.hidden[0, 0] + 3 * view.hidden[0, 2]) / 4)
    nobody = Summary().merge(view, merge.kept & (own(merge.kept) == 1), None)
    assert nobody.owner.tolist() == [[0, 1, 0, 0]]
    everything = dataclasses.replace(view, keep=torch.tensor([1]))
    assert merged(Summary(), everything, scores).owner.tolist() == [[1, 1, 1, 1]]
    # scores of 0 weigh nothing: then all alike
    flat = merged(Summary(weights="score"), view, torch.tensor([[0.0, 9.0, 0.0, -1.0]]))
    torch.testing.assert_close(states_of(view, flat)[0, 0], view.hidden[0, [0, 2, 3]].mean(0))


def test_summary_weights_are_checked() -> None:
    with pytest.raises(PlanError, match="summary weights must be 'equal' or 'score', got 'size'"):
        Summary(weights="size")  # type: ignore[arg-type]


# recycle


def test_density_peaks_by_hand() -> None:
    # on a line: a close pair, a close triple, one alone; D = 1. k = 1: nearest at 1, 1, .5, .5, .5, 4
    points = torch.tensor([[0.0], [1.0], [10.0], [10.5], [11.0], [15.0]])
    # the triple is densest, exp(-1/4) = .78, and its first is its peak: farthest point 10 away, 7.8. The pair has
    # exp(-1) = .37: 0 is 10 away from denser ones and 1 is 9 away, but 1 has 0 (denser by order) beside it: 3.7 and
    # .37. The lone one exp(-16) * 4
    assert density_peaks(points, 1, 1).tolist() == [2]
    assert density_peaks(points, 2, 1).tolist() == [0, 2]
    # then those of the triple, .78 * .5 = .39 each, before the second of the pair
    assert density_peaks(points, 3, 1).tolist() == [0, 2, 3]
    assert density_peaks(points, 6, 1).tolist() == list(range(6))


def peaks(points: Tensor, clusters: int, k: int) -> list[int]:
    """The rule one point at a time."""
    n, width = points.shape
    far = [[float((points[i] - points[j]).double().norm()) / math.sqrt(width) for j in range(n)] for i in range(n)]
    near = [sorted(far[i][j] for j in range(n) if j != i)[:k] for i in range(n)]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in near]
    score = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else max(far[i])))
    return sorted(sorted(range(n), key=lambda i: -score[i])[:clusters])


@pytest.mark.parametrize(("n", "clusters", "k"), [(9, 3, 2), (23, 5, 5), (17, 1, 40)])
def test_density_peaks_equal_the_rule(n: int, clusters: int, k: int) -> None:
    points = Sample(((1, n),), seed=n).normal("points", n, WIDTH)
    assert density_peaks(points, clusters, k).tolist() == peaks(points, clusters, k)


def test_recycle_counts() -> None:
    rule = Recycle()
    # 110 of 200 as in SparseVLM's second stage: 90 leave, floor(27) come back in 3 clusters; they count among the 110,
    # so 93 are not selected, floor(27.9) come back, in 3 clusters still
    assert rule.clusters(110, 200) == 3
    # 64 of 576: 512 leave, 153 in 16 clusters; then 528 leave, 158 in 16
    assert rule.clusters(64, 576) == 16
    assert rule.clusters(3, 576) == 2  # one token at least stays as it is
    assert (rule.clusters(1, 576), rule.clusters(0, 9), rule.clusters(9, 9)) == (0, 0, 0)
    for keep in range(2, 60):
        found = rule.clusters(keep, 100)
        wanted = max(1, math.floor(0.3 * (100 - keep + found))) // 10 + 1
        assert found == min(keep - 1, wanted)


def test_recycle_by_hand() -> None:
    view, _ = view_of(Sample(((2, 5),)), keep=(4,))
    angles = plane(0, 5, 90, 96, 180, 187, 275, 283, 300, 310)
    view = dataclasses.replace(view, hidden=angles)
    # 2 of 4 clusters' worth: group 3 and share 0.8: with 2 clusters 8 are not selected, 6 come back, 6 // 3 + 1 = 3;
    # with 3 clusters 9, 7 come back, 3
    rule = Recycle(share=0.8, group=3, neighbours=2)
    scores = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 9, 1, 0]])
    assert rule.places(view).tolist() == [3]
    merge = merged(rule, view, scores)
    # 283 degrees stays; of the rest 0 to 275 come back (7), 300 and 310 do not
    back = [0, 1, 2, 3, 4, 5, 6]
    centres = [back[i] for i in peaks(angles[0, back], 3, 2)]
    assert merge.kept[0].nonzero()[:, 0].tolist() == sorted([*centres, 7])
    assert merge.owner[0, [7, 8, 9]].tolist() == [7, 8, 9]
    unit = torch.nn.functional.normalize(angles[0], dim=1)
    for token in back:
        assert merge.owner[0, token] == max(centres, key=lambda c: round(float(unit[token] @ unit[c]), 5))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"share": 0}, r"share must be a number in \(0, 1\], got 0"),
        ({"group": 0}, "group must be an int >= 1, got 0"),
        ({"neighbours": 1.5}, "neighbours must be an int >= 1, got 1.5"),
    ],
)
def test_recycle_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"recycle {message}"):
        Recycle(**knobs)


# contextual


def test_contextual_by_hand() -> None:
    view, _ = view_of(Sample(((1, 6),)), keep=(3,))
    view = dataclasses.replace(view, hidden=plane(0, 80, 10, 20, 90, 40))
    # round(3 * 0.5) = 2 targets; 80 stays. Of the rest 0, 10, 20, 90, 40 every second: 0 and 20 are targets. 10 is as
    # far from both: the earlier; 90 and 40 go to 20
    rule = Contextual(share=0.5)
    scores = torch.tensor([[0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    merge = merged(rule, view, scores)
    assert merge.kept.nonzero()[:, 1].tolist() == [0, 1, 3]
    assert merge.owner.tolist() == [[0, 1, 0, 3, 3, 3]]
    out, states = states_of(view, merge)[0], view.hidden[0]
    torch.testing.assert_close(out[0], states[0] + states[2])
    torch.testing.assert_close(out[1], states[1])
    torch.testing.assert_close(out[3], states[3] + (states[4] + states[5]) / 2)
    averaged = states_of(view, merged(Contextual(share=0.5, mean=True), view, scores))[0]
    torch.testing.assert_close(averaged[3], states[[3, 4, 5]].mean(0))
    # by what the method remembers: there 90 is like 0
    metric = view.hidden.clone()
    metric[0, 4] = metric[0, 0]
    known = dataclasses.replace(view, memory={"metric": metric})
    assert merged(rule, known, scores).owner.tolist() == [[0, 1, 0, 3, 0, 3]]


def test_contextual_equals_the_rule() -> None:
    view, scores = view_of(Sample(((5, 9),), seed=3), keep=(13,))
    rule = Contextual(share=0.3)  # 3.9 -> 4
    merge = merged(rule, view, scores)
    order = scores[0].argsort(descending=True).tolist()
    rest = sorted(order[9:])
    stride = len(rest) // 4
    targets = rest[::stride][:4]
    assert merge.kept[0].nonzero()[:, 0].tolist() == sorted([*order[:9], *targets])
    unit = view.hidden[0] / view.hidden[0].norm(dim=1, keepdim=True)
    members: dict[int, list[int]] = {t: [] for t in targets}
    for token in rest:
        if token not in targets:
            members[max(targets, key=lambda t: float(unit[token] @ unit[t]))].append(token)
    out = states_of(view, merge)[0]
    for target, mine in members.items():
        want = view.hidden[0, target] + (view.hidden[0, mine].mean(0) if mine else 0.0)
        torch.testing.assert_close(out[target], want)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"share": 1.0}, r"share must be a number in \[0, 1\), got 1.0"),
        ({"mean": 3}, "mean must be True or False, got 3"),
    ],
)
def test_contextual_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"contextual {message}"):
        Contextual(**knobs)


# the stage that carries them


def test_a_rule_that_needs_scores_is_refused_on_a_method_without() -> None:
    for rules in ({"selection": vt_topk()}, {"remainder": Summary(weights="score")}, {"remainder": Recycle()}):
        with pytest.raises(PlanError, match="needs a score for every token, but uniform chooses a set and gives none"):
            Stage(Site("input"), Uniform(), 4, **rules)
    assert Stage(Site("input"), Uniform(), 4, remainder=Nearest()).merges


def test_another_selection_on_a_method_that_merges_needs_a_remainder_too() -> None:
    """The method's own owners may leave under another selection: what is averaged into them would be lost."""
    for name in ("pool", "tome"):
        with pytest.raises(PlanError, match=rf"{name} averages what leaves .* such as {name}/maxmin/nearest") as caught:
            Stage(Site("input"), METHODS[name](), 4, selection=MaxMin())
        assert "selection maxmin keeps others" in str(caught.value)
        assert Stage(Site("input"), METHODS[name](), 4, selection=MaxMin(), remainder=Nearest()).merges
        assert not Stage(Site("input"), METHODS[name](), 4, selection=MaxMin(), remainder=Drop()).merges


def vt_topk() -> object:
    from vtprune.selections.top_k import TopK

    return TopK()


def test_a_rule_that_miscounts_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class TooMany(type(vt_topk())):
        def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
            return view.valid

    view = token_view([Sample(((2, 2),))], [3])
    from vtprune.scorers.random_tokens import Random

    stage = Stage(Site("input"), Random(), 3, selection=TooMany())
    with pytest.raises(
        PlanError, match=r"selection topk on random kept \[4\] tokens a sample at input, but \[3\] were"
    ):
        choose(stage, view, [3])
