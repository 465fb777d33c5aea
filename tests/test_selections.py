"""Selections by themselves: examples worked by hand, slow plain references, and what all of them must do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scorer_views import WIDTH, Sample, token_view
from torch import Tensor

import vtprune
from vtprune import similarity
from vtprune.errors import PlanError, UnknownNameError
from vtprune.rules import SELECTIONS, Selection
from vtprune.selections import coverage
from vtprune.selections.coverage import Coverage
from vtprune.selections.dpp import DPP
from vtprune.selections.frames import Frames
from vtprune.selections.max_min import MaxMin
from vtprune.selections.pairs import Pairs
from vtprune.selections.strata import Strata, split_by_weight
from vtprune.selections.threshold import Threshold
from vtprune.selections.top_k import TopK
from vtprune.views import TokenView

SAMPLES = (
    Sample(((3, 4), (2, 2)), seed=1),
    Sample(((5, 5),), seed=2),
    Sample(((1, 1),), seed=3),
    Sample(((4, 4),), seed=4, gone=(0, 3, 4, 9)),
)
KEEP = (5, 7, 1, 6)
EVERY = [*(SELECTIONS[name]() for name in SELECTIONS), DPP(theta=0.7), Strata(by="window", rows=2, cols=3)]
EVERY += [Strata(within="dpp", share="score"), Strata(by="grid", within="maxmin"), Strata(by="frame")]
every = pytest.mark.parametrize("selection", EVERY, ids=str)


def view_of(*samples: Sample, keep: tuple[int, ...], poison: float = math.nan) -> tuple[TokenView, Tensor]:
    """A view and scores of it, anything at padding; every grid is an image."""
    view = token_view(samples, keep, poison=poison)
    scores = torch.full(view.valid.shape, poison)
    for b, sample in enumerate(samples):
        scores[b, : len(sample.alive)] = sample.normal("score", sample.total).abs()[sample.alive]
    return dataclasses.replace(view, images=tuple(tuple(range(len(s.grids))) for s in samples)), scores


def picked(selection: Selection, view: TokenView, scores: Tensor | None) -> list[list[int]]:
    """Original indices of what is chosen."""
    kept = selection.select(view, scores)
    assert kept.dtype == torch.bool
    assert not (kept & ~view.valid).any()
    return [view.original[b][kept[b]].tolist() for b in range(len(kept))]


def plane(*degrees: float) -> Tensor:
    """[1, n, WIDTH] states at these angles."""
    angle = torch.tensor(degrees).deg2rad()
    states = torch.zeros(1, len(degrees), WIDTH)
    states[0, :, 0], states[0, :, 1] = 3 * angle.cos(), 3 * angle.sin()
    return states


# what all of them must do


@every
@pytest.mark.parametrize("poison", [math.nan, 1e4, -1e4])
def test_counts_and_no_batch_mates(selection: Selection, poison: float) -> None:
    together = picked(selection, *view_of(*SAMPLES, keep=KEEP, poison=poison))
    assert [len(tokens) for tokens in together] == list(KEEP)
    for sample, keep, tokens in zip(SAMPLES, KEEP, together, strict=True):
        assert set(tokens) <= set(sample.alive)
        assert picked(selection, *view_of(sample, keep=(keep,))) == [tokens]


@every
def test_everything_nothing_and_one(selection: Selection) -> None:
    alive = tuple(len(s.alive) for s in SAMPLES)
    assert picked(selection, *view_of(*SAMPLES, keep=alive)) == [s.alive for s in SAMPLES]
    more = tuple(n + 3 for n in alive)
    assert picked(selection, *view_of(*SAMPLES, keep=more)) == [s.alive for s in SAMPLES]
    assert picked(selection, *view_of(*SAMPLES, keep=(0,) * 4)) == [[]] * 4
    assert [len(t) for t in picked(selection, *view_of(*SAMPLES, keep=(1,) * 4))] == [1] * 4
    empty = (SAMPLES[0], Sample(()))
    assert [len(t) for t in picked(selection, *view_of(*empty, keep=(4, 0)))] == [4, 0]


# pairs are made of even and odd places, and crops of neighbours, so that order matters
orderless = pytest.mark.parametrize("selection", [s for s in EVERY if s.name not in ("pairs", "crops")], ids=str)


@orderless
def test_the_order_of_tokens_does_not_matter(selection: Selection) -> None:
    sample = Sample(((5, 6),), seed=9)
    view, scores = view_of(sample, keep=(11,))
    want = picked(selection, view, scores)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    moved = {k: v[:, order] for k, v in moved.items() if isinstance(v, Tensor) and v.dim() > 1}
    assert [sorted(t) for t in picked(selection, dataclasses.replace(view, **moved), scores[:, order])] == want


@orderless
def test_equal_tokens_are_told_apart_by_order(selection: Selection) -> None:
    view, scores = view_of(*SAMPLES, keep=KEEP)
    same = dataclasses.replace(view, hidden=torch.ones_like(view.hidden))
    kept = selection.select(same, torch.ones_like(scores))
    if isinstance(selection, (Strata, Frames)):
        one = tuple((0,) * len(grids) for grids in same.grids)
        same = dataclasses.replace(same, grid=torch.zeros_like(same.grid), images=one)
        same = dataclasses.replace(same, row=same.row * 0, col=same.col * 0)
        kept = selection.select(same, torch.ones_like(scores))
    assert torch.equal(kept, torch.arange(kept.shape[1])[None] < view.keep[:, None])


@every
def test_selections_survive_json(selection: Selection) -> None:
    assert Selection.from_dict(selection.to_dict()) == selection
    with pytest.raises(PlanError, match=rf"{selection.name} has the knobs \[.*\], got \['tempo'\] beside them"):
        Selection.from_dict({**selection.to_dict(), "tempo": 1})
    assert SELECTIONS[selection.name].summary


def test_unknown_selection_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown selection 'maxmim'\. Did you mean 'maxmin'\?"):
        Selection.from_dict({"name": "maxmim"})


@pytest.mark.parametrize("selection", [TopK(), Threshold(), Strata(share="score"), Pairs()], ids=str)
def test_those_that_need_scores_say_so(selection: Selection) -> None:
    assert selection.needs_scores
    view, _ = view_of(*SAMPLES, keep=KEEP)
    with pytest.raises(PlanError, match=f"{selection.name} needs a score for every token, and got none"):
        selection.select(view, None)
    assert not DPP().needs_scores
    assert not MaxMin().needs_scores
    assert Strata(within="topk").needs_scores
    assert not Strata(within="dpp").needs_scores


# max-min


def test_max_min_on_four_tokens_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(1,))
    # nearest neighbours: 0-10: 10 degrees, 90: 80 (to 10), 200: 110 (to 90). Then 10 (170 from 200), 90 and 0
    view = dataclasses.replace(view, hidden=plane(0, 10, 90, 200))
    for keep, want in enumerate([[3], [1, 3], [1, 2, 3], [0, 1, 2, 3]], start=1):
        assert picked(MaxMin(), dataclasses.replace(view, keep=torch.tensor([keep])), None) == [want]


@pytest.mark.parametrize("block", [1 << 22, 50])
def test_max_min_equals_the_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", block)
    for keep in (1, 4, 17):
        view, _ = view_of(Sample(((7, 5),), seed=6), keep=(keep,))
        unit = view.hidden[0].double() / view.hidden[0].double().norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        chosen = [max(range(35), key=lambda i: min(float(distance[i, j]) for j in range(35) if j != i))]
        while len(chosen) < keep:
            left = [i for i in range(35) if i not in chosen]
            chosen.append(max(left, key=lambda i: min(float(distance[i, j]) for j in chosen)))
        assert picked(MaxMin(), view, None) == [sorted(chosen)]


# DPP


def greedy_determinant(states: Tensor, quality: Tensor, keep: int) -> list[int]:
    """The greedy set by determinants of the kernel itself, fp64, one at a time."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    kernel = quality.double()[:, None] * (unit @ unit.T) * quality.double()
    chosen: list[int] = []
    while len(chosen) < keep:
        left = [i for i in range(len(states)) if i not in chosen]
        volume = [float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in left]
        # the first of those that are equal but for rounding
        chosen.append(next(i for i, v in zip(left, volume, strict=True) if v >= (1 - 1e-9) * max(volume)))
    return sorted(chosen)


def min_max(scores: Tensor) -> Tensor:
    return ((scores - scores.min()) / (scores.max() - scores.min())).clamp(min=1e-6)


@pytest.mark.parametrize("keep", [1, 2, 5, 13])
def test_dpp_equals_determinants(keep: int) -> None:
    # the states have 16 dimensions, so that 13 of 21 tokens still span something new
    for seed in range(3):
        view, scores = view_of(Sample(((3, 7),), seed=seed), keep=(keep,))
        assert picked(DPP(), view, scores) == [greedy_determinant(view.hidden[0], min_max(scores[0]), keep)]
        assert picked(DPP(), view, None) == [greedy_determinant(view.hidden[0], torch.ones(21), keep)]
        weighted = (0.8 / 0.4 * min_max(scores[0])).exp()
        assert picked(DPP(theta=0.8), view, scores) == [greedy_determinant(view.hidden[0], weighted, keep)]


def test_dpp_on_four_tokens_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(1,))
    view = dataclasses.replace(view, hidden=plane(0, 10, 60, 90))
    # r = (1, .9, .5, .4) scaled to (0, 1]: (1, 5/6, 1/6, 1e-6). First 0. Then r^2 sin^2: 10 degrees 0.694 * 0.030 =
    # 0.0209, 60 degrees 0.0278 * 0.75 = 0.0208: by a hair the nearer one, because it scores so much more
    scores = torch.tensor([[1.0, 0.9, 0.5, 0.4]])
    two = dataclasses.replace(view, keep=torch.tensor([2]))
    assert picked(DPP(), two, scores) == [[0, 1]]
    # without scores the one at a right angle
    assert picked(DPP(), two, None) == [[0, 3]]
    assert picked(DPP(theta=0.0), two, scores) == [[0, 3]]
    # two dimensions are spanned: what is left goes by score
    three = dataclasses.replace(view, keep=torch.tensor([3]))
    assert picked(DPP(), three, scores) == [[0, 1, 2]]
    assert picked(DPP(), three, scores.flip(1)) == [[1, 2, 3]]


def test_dpp_takes_duplicates_last_and_survives_zero_vectors() -> None:
    view, scores = view_of(Sample(((1, 8),), seed=3), keep=(4,))
    hidden = view.hidden.clone()
    hidden[0, 4:] = hidden[0, :1] * torch.tensor([[1.0], [2.0], [0.5], [7.0]])
    kept = DPP().select(dataclasses.replace(view, hidden=hidden), None)[0]
    assert kept.tolist() == [True] * 4 + [False] * 4
    zeros = dataclasses.replace(view, hidden=torch.zeros_like(hidden))
    assert DPP().select(zeros, None)[0].tolist() == [True] * 4 + [False] * 4
    best = scores[0].argsort(descending=True)[:4].sort().values.tolist()
    assert picked(DPP(), zeros, scores) == [best]


@pytest.mark.parametrize("theta", [1.0, -0.1, True, "a"])
def test_dpp_theta(theta: object) -> None:
    with pytest.raises(PlanError, match=rf"dpp theta must be a number in \[0, 1\) or None, got {theta!r}"):
        DPP(theta=theta)  # type: ignore[arg-type]


# thresholds


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        # of 5, 3, 1, 1 (sum 10): 5 holds half, 5 + 3 holds 0.8
        (Threshold(at=0.5), 1),
        (Threshold(at=0.51), 2),
        (Threshold(at=0.8), 2),
        (Threshold(at=1.0), 4),
        (Threshold(at=0.6, unit="max"), 2),
        (Threshold(at=0.61, unit="max"), 1),
        (Threshold(at=1, unit="score"), 4),
        (Threshold(at=3.5, unit="score"), 1),
        (Threshold(at=9, unit="score"), 0),
    ],
    ids=str,
)
def test_thresholds_by_hand(rule: Threshold, want: int) -> None:
    view, _ = view_of(Sample(((1, 4),)), Sample(((1, 5),)), keep=(1, 1))
    scores = torch.tensor([[1.0, 5.0, 1.0, 3.0, 99.0], [1.0, 5.0, 0.0, 3.0, 1.0]])
    assert rule.count(view, scores).tolist()[0] == want
    if rule.unit != "score" and rule.at < 1:
        assert rule.count(view, scores).tolist()[1] == want


def test_a_threshold_on_scores_of_zero_keeps_all() -> None:
    view, scores = view_of(*SAMPLES, keep=KEEP)
    assert Threshold().count(view, torch.zeros_like(scores)).tolist() == [16, 25, 1, 12]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"unit": "sum"}, "unit must be 'max', 'mass' or 'score', got 'sum'"),
        ({"at": 0}, r"at must be a number in \(0, 1\] with unit='mass', got 0"),
        ({"at": "a", "unit": "score"}, "at must be a number, got 'a'"),
    ],
)
def test_threshold_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Threshold(**knobs)


# strata


def test_every_image_gets_its_share() -> None:
    view, scores = view_of(SAMPLES[0], keep=(8,))
    scores = scores.clone()
    scores[0, :12] += 100.0  # the first image would take all
    assert all(token < 12 for token in picked(TopK(), view, scores)[0])
    kept = picked(Strata(), view, scores)[0]
    assert [sum(t < 12 for t in kept), sum(t >= 12 for t in kept)] == [6, 2]
    first = scores[0, :12].argsort(descending=True)[:6].sort().values.tolist()
    assert kept[:6] == first
    # two grids of one image
    one = dataclasses.replace(view, images=((0, 0),))
    assert picked(Strata(), one, scores) == picked(TopK(), view, scores)
    assert picked(Strata(by="grid"), one, scores)[0] == kept


def test_windows_by_hand() -> None:
    view, _ = view_of(Sample(((4, 4),)), keep=(4,))
    scores = torch.arange(16.0)[None]
    # 2 x 2 windows of 2 x 2 tokens, one each: the last of each window
    assert picked(Strata(by="window", rows=2, cols=2), view, scores) == [[5, 7, 13, 15]]
    # by mean score: 2.5, 4.5, 10.5 and 12.5 of 30; the floors of 4 w / 30 are 0, 0, 1, 1, and the heaviest get one more
    assert picked(Strata(by="window", rows=2, cols=2, share="score"), view, scores) == [[12, 13, 14, 15]]
    # nobody scores: the first of each window
    assert picked(Strata(by="window", rows=2, cols=2), view, None) == [[0, 2, 8, 10]]


def test_inside_a_part_another_rule_may_choose() -> None:
    view, scores = view_of(SAMPLES[0], keep=(8,))
    parts = [view_of(SAMPLES[0], keep=(n,))[0] for n in (6, 2)]
    spans = (slice(0, 12), slice(12, 16))
    for within in ("maxmin", "dpp"):
        want = []
        for part, span in zip(parts, spans, strict=True):
            cut = {k: getattr(part, k)[:, span] for k in ("hidden", "valid", "original", "grid", "row", "col")}
            want += picked(SELECTIONS[within](), dataclasses.replace(part, **cut), scores[:, span])[0]
        assert picked(Strata(within=within), view, scores) == [want]


def test_dealing_by_weight() -> None:
    assert split_by_weight(10, [3.0, 2.0, 5.0], [9, 9, 9]) == [3, 2, 5]
    assert split_by_weight(4, [2.5, 4.5, 10.5, 12.5], [4] * 4) == [0, 0, 2, 2]
    # what does not fit goes to the others
    assert split_by_weight(10, [8.0, 1.0, 1.0], [4, 5, 5]) == [4, 3, 3]
    assert split_by_weight(3, [0.0, 0.0], [2, 2]) == [2, 1]
    assert split_by_weight(3, [1.0, 0.0], [2, 2]) == [2, 1]
    for n in range(11):
        shares = split_by_weight(n, [0.3, 1e-9, 7.0], [5, 4, 1])
        assert sum(shares) == n
        assert all(a <= b for a, b in zip(shares, [5, 4, 1], strict=True))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"by": "film"}, "by must be 'image', 'frame', 'grid' or 'window', got 'film'"),
        ({"share": "x"}, "share must be 'tokens' or 'score', got 'x'"),
        ({"rows": 0}, "rows must be an int >= 1, got 0"),
        ({"within": "threshold"}, r"must name a selection with a fixed count \(topk, maxmin, dpp\), got 'threshold'"),
        ({"within": "strata"}, "got 'strata'"),
        ({"within": 3}, "got 3"),
    ],
)
def test_strata_knobs(knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Strata(**knobs)


# pairs


def paired(states: Tensor, scores: Tensor, keep: int, important: float, at_once: int) -> list[int]:
    """The rule one token at a time."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    best = sorted(range(len(states)), key=lambda i: -float(scores[i]))[: int(important * keep)]
    left = [i for i in range(len(states)) if i not in best]
    while len(left) > keep - len(best):
        even, odd = left[::2], left[1::2]
        alike = {a: max((float(unit[a] @ unit[b]) for b in odd), default=-9.0) for a in even}
        number = min(at_once, len(left) - (keep - len(best)))
        out = sorted(even, key=lambda a: -alike[a])[:number]
        left = [i for i in left if i not in out]
    return sorted(best + left)


@pytest.mark.parametrize(("keep", "important", "at_once"), [(9, 0.5, 8), (8, 0.25, 3), (20, 0.0, 1), (5, 1.0, 8)])
@pytest.mark.parametrize("most", [1 << 24, 0], ids=["known pairs", "too many pairs"])
def test_pairs_equal_the_rule(
    keep: int, important: float, at_once: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.selections.pairs._MOST", most)
    rule = Pairs(important, at_once)
    samples = [Sample(((3, 9),), seed=seed) for seed in range(3)] + [Sample(((1, 40),), seed=5)]
    view, scores = view_of(*samples, keep=(keep,) * 4)
    want = [paired(view.hidden[b, :n], scores[b], keep, important, at_once) for b, n in enumerate((27, 27, 27, 40))]
    assert picked(rule, view, scores) == want


def test_pairs_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(2,))
    view = dataclasses.replace(view, hidden=plane(0, 60, 5, 90))
    # 90 is important; of 0, 60, 5 the even ones 0 and 5 are 60 and 55 degrees from the odd 60: 5 goes, then 0
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert picked(Pairs(at_once=1), view, scores) == [[1, 3]]
    three = dataclasses.replace(view, keep=torch.tensor([3]))
    assert picked(Pairs(at_once=1), three, scores) == [[0, 1, 3]]
    # floor(0.34 * 3) = 1 is important
    assert picked(Pairs(important=0.34), three, scores) == [[0, 1, 3]]
    with pytest.raises(PlanError, match=r"pairs important must be a number in \[0, 1\], got 1.5"):
        Pairs(important=1.5)
    with pytest.raises(PlanError, match="pairs at_once must be an int >= 1, got 0"):
        Pairs(at_once=0)


def test_selections_are_importable_by_name() -> None:
    assert vtprune.DPP is DPP
    assert vtprune.MaxMin is MaxMin


# coverage


def covering(states: Tensor, weight: Tensor, keep: int) -> list[int]:
    """The rule with the whole matrix, one sample, float64: tokens in the order in which they are chosen."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    best, chosen = torch.zeros(len(states), dtype=torch.float64), []
    for _ in range(keep):
        gain = [float((cosine[:, v] - best).clamp(min=0.0).sum() * weight[v].double()) for v in range(len(states))]
        chosen.append(max((v for v in range(len(states)) if v not in chosen), key=lambda v: gain[v]))
        best = torch.maximum(best, cosine[:, chosen[-1]])
    return chosen


def test_coverage_on_four_tokens_by_hand() -> None:
    view, _ = view_of(Sample(((1, 4),)), keep=(1,))
    view = dataclasses.replace(view, hidden=plane(0, 60, 120, 100))
    # cosines .5 (60 apart), .77 (40), .94 (20); 100 and 120 apart cover nothing. Gains 1.5, 2.77, 2.44, 2.71: 60 first.
    # Then 0 adds .5, 120 adds .5 and .17, 100 adds .44 and .23, which is as much: the earlier. Then 0, and the last
    for alone in (None, torch.tensor([[3.0, 1.0, 4.0, 1.0]])):
        rule = Coverage() if alone is None else Coverage(alpha=0.0)
        for keep, want in enumerate(([], [1], [1, 2], [0, 1, 2], [0, 1, 2, 3])):
            cut = dataclasses.replace(view, keep=torch.tensor([keep]))
            assert picked(rule, cut, alone) == [want]
    # times 1, .5, .4, .5: 1.5, 1.38, .98, 1.35. Then 60 adds .5 + .5 + .77 = 1.77, 120 adds 1.94, 100 adds 2.21: .88,
    # .78, 1.10. Then 60 adds .23 and 120 adds .06: .12, .02
    scores = torch.tensor([[1.0, 0.5, 0.4, 0.5]])
    for keep, want in enumerate(([], [0], [0, 3], [0, 1, 3])):
        assert picked(Coverage(), dataclasses.replace(view, keep=torch.tensor([keep])), scores) == [want]
    # squared: 1.5, .69, .39, .68; then .44, .31, .55
    assert picked(Coverage(alpha=2.0), dataclasses.replace(view, keep=torch.tensor([2])), scores) == [[0, 3]]
    # tokens whose score is nothing come last
    assert picked(Coverage(), dataclasses.replace(view, keep=torch.tensor([2])), torch.tensor([[1.0, 0, 0, 0.1]])) == [
        [0, 3]
    ]
    with pytest.raises(PlanError, match=r"coverage alpha must be a number >= 0, got -0\.5"):
        Coverage(alpha=-0.5)


@pytest.mark.parametrize(("held", "block"), [(1 << 26, 1 << 22), (1, 50)])
def test_coverage_equals_the_rule(held: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_HELD", held)
    monkeypatch.setattr(similarity, "_BLOCK", block)
    samples = (Sample(((5, 6),), seed=1), Sample(((3, 3),), seed=2), Sample(((7, 3),), seed=3))
    for alpha in (1.0, 0.5):
        for keep in ((1, 1, 1), (2, 8, 20), (29, 3, 7)):
            view, scores = view_of(*samples, keep=keep)
            want = [
                sorted(covering(view.hidden[b, : s.total], scores[b, : s.total].double() ** alpha, k))
                for b, (s, k) in enumerate(zip(samples, keep, strict=True))
            ]
            assert picked(Coverage(alpha), view, scores) == want


def test_coverage_takes_twins_last_and_the_order_of_tokens_does_not_matter() -> None:
    view, scores = view_of(Sample(((2, 4),), seed=3), keep=(4,))
    hidden = view.hidden.clone()
    hidden[0, 4:] = hidden[0, :1] * torch.tensor([[1.0], [2.0], [0.5], [7.0]])
    assert picked(Coverage(), dataclasses.replace(view, hidden=hidden), torch.ones(1, 8)) == [[0, 1, 2, 3]]
    turned = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    mine = dataclasses.replace(view, hidden=view.hidden[:, turned])
    (kept,) = picked(Coverage(), mine, scores[:, turned])
    assert sorted(turned[kept].tolist()) == picked(Coverage(), view, scores)[0]
