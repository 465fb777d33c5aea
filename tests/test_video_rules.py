"""EVS, VidCom2 and uniform frames by themselves: examples worked by hand, slow plain references, properties."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from films import as_spots, evs_keeps, film, still, together, vidcom2_keeps
from scorer_views import LLAVA, WIDTH, Sample, token_view
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.contract import Scorer
from vtprune.errors import BudgetError, PlanError
from vtprune.frames import FrameMap, frame_numbers, opening_tokens, ranks_within
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.evs import EVS
from vtprune.scorers.uniform_frames import UniformFrames
from vtprune.scorers.vidcom2 import VidCom2
from vtprune.selections.frames import Frames, frame_quotas
from vtprune.selections.strata import Strata
from vtprune.views import TokenView

# odd sizes on purpose: a film, two films of other sizes, a film beside an image, CLS and patches, a newline at the end
FILMS = (
    film(3, 3, 3, seed=1),
    together(film(5, 2, 3, seed=2), film(2, 3, 5, seed=2)),
    together(still(3, 4), film(7, 1, 3), seed=3),
    Sample(((1, 1), (2, 2)) * 3, seed=4, images=(0,) * 6, frames=(0, 0, 1, 1, 2, 2)),
    Sample(((2, 2), (2, 2), (2, 2), (1, 1)), seed=5, images=(0,) * 4, frames=(0, 1, 2, None)),
)


def kept(scorer: Scorer, view: TokenView) -> list[list[int]]:
    """Original indices of what each sample keeps, by the rules of the scorer's stage."""
    stage = Stage(Site("input"), scorer, 1)
    selection = stage.rules[0]
    mask = scorer.select(view) if selection is None else selection.select(view, scorer.score(view))
    assert not (mask & ~view.valid).any()
    return [view.original[b][row].tolist() for b, row in enumerate(mask)]


def angles(*degrees: float) -> Tensor:
    """[1, n, WIDTH] states at these angles, of different lengths."""
    angle = torch.tensor(degrees).deg2rad()
    states = torch.zeros(1, len(degrees), WIDTH)
    states[0, :, 0], states[0, :, 1] = angle.cos(), angle.sin()
    return states * torch.arange(1, len(degrees) + 1)[None, :, None]


# which token lies where in time


def test_grids_are_counted_into_frames() -> None:
    assert frame_numbers((0, 0, 1), (None, None, None)) == ((0, 0), (0, 1), (1, 0))
    assert frame_numbers((0, 0, 0, 0), (0, 0, 2, 2)) == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert frame_numbers((0, 1, 1, 1), (None, 0, 2, None)) == ((0, 0), (1, 0), (2, 0), (2, 1))
    assert frame_numbers((0, 0, 1, 1), (0, 2, 0, 2)) == ((0, 0), (1, 0), (2, 0), (3, 0))


@pytest.mark.parametrize(("sample", "opening"), list(zip(FILMS, (9, 6 + 15, 12 + 3, 5, 5), strict=True)))
def test_tokens_without_a_forerunner_are_counted(sample: Sample, opening: int) -> None:
    assert opening_tokens(sample.images, sample.frames, sample.grids) == opening
    frames = FrameMap.of(token_view([sample], [1]))
    before = frames.before(torch.ones(1, sample.total, dtype=torch.bool))[0]
    assert int((before == torch.arange(sample.total)).sum()) == opening


def test_frames_of_different_sizes_share_their_corner() -> None:
    assert opening_tokens((0, 0, 0), (0, 1, 2), ((2, 3), (3, 2), (1, 4))) == 4 + 3 + 2
    view = token_view([Sample(((2, 3), (3, 2)), images=(0, 0), frames=(0, 1))], [1])
    before = FrameMap.of(view).before(view.valid)[0].tolist()
    assert before == [0, 1, 2, 3, 4, 5, 0, 1, 3, 4, 10, 11]


def test_ranks_are_those_of_the_part() -> None:
    scores = torch.tensor([[2.0, 5.0, 2.0, float("nan"), 9.0, 7.0]])
    part = torch.tensor([[0, 1, 0, 0, 1, 0]])
    valid = torch.tensor([[True, True, True, True, True, False]])
    assert ranks_within(scores, part, 2, valid)[0, :5].tolist() == [0, 1, 1, 2, 0]


def test_strata_by_frame_gives_cls_and_patches_one_quota() -> None:
    view = token_view([FILMS[3]], [3])
    # CLS scores best, and would have no share of its own
    mask = Strata(by="frame").select(view, -torch.arange(15.0)[None])[0]
    assert mask.nonzero()[:, 0].tolist() == [0, 5, 10]


# EVS


def test_evs_by_hand() -> None:
    view = token_view([film(2, 1, 2)], [3])
    view = dataclasses.replace(view, hidden=angles(0.0, 30.0, 60.0, 120.0))
    # 60 degrees after 0 is 1 - cos 60 = 1/2; 120 after 30 is 1 - cos 90 = 1; the first frame has no forerunner
    torch.testing.assert_close(EVS().score(view), torch.tensor([[3.0, 3.0, 0.5, 1.0]]), atol=1e-6, rtol=0)
    assert kept(EVS(), view) == [[0, 1, 3]]


@pytest.mark.parametrize("share", [0.62, 0.75, 0.9])
def test_evs_equals_the_rule(share: float) -> None:
    counts = [max(spotted(s), int(share * s.total)) for s in FILMS]
    view = token_view(FILMS, counts)
    want = [evs_keeps(as_spots(s), s.normal("hidden", s.total, WIDTH), n) for s, n in zip(FILMS, counts, strict=True)]
    assert kept(EVS(), view) == want
    assert [len(tokens) for tokens in want] == counts


def spotted(sample: Sample) -> int:
    return opening_tokens(sample.images, sample.frames, sample.grids)


def test_evs_prunes_films_of_one_prompt_at_one_rate() -> None:
    """Also where everything moves in one of them and nothing in the other, unlike when they compete."""
    sample = together(film(4, 1, 5), film(4, 1, 5))
    view = token_view([sample], [24])
    hidden = view.hidden.clone()
    hidden[0, :20] = hidden[0, :1]
    view = dataclasses.replace(view, hidden=hidden)
    assert kept(EVS(), view) == [evs_keeps(as_spots(sample), hidden[0], 24)]
    assert [sum(t < 20 for t in kept(EVS(), view)[0]), sum(t >= 20 for t in kept(EVS(), view)[0])] == [12, 12]
    pooled = vtprune.TopK().select(view, EVS().score(view))[0]
    assert [int(pooled[:20].sum()), int(pooled[20:].sum())] == [5, 19]


def test_evs_looks_past_frames_whose_token_has_left() -> None:
    view = token_view([dataclasses.replace(film(3, 1, 2), gone=(0, 3))], [3])
    view = dataclasses.replace(view, hidden=angles(0.0, 10.0, 10.0, 90.0))
    # left are 1 of frame 0, 2 of frame 1, 4 and 5 of frame 2; 2 has lost its forerunner, 5 looks at 1
    want = torch.tensor([[3.0, 3.0, 0.0, 1.0]])
    torch.testing.assert_close(EVS().score(view), want, atol=1e-6, rtol=0)


def test_evs_of_a_still_film_keeps_what_comes_first() -> None:
    view = token_view([film(4, 2, 2)], [7])
    same = dataclasses.replace(view, hidden=view.hidden[:, :4].repeat(1, 4, 1))
    assert kept(EVS(), same) == [list(range(7))]


def test_evs_does_not_mind_where_in_the_frame_things_are() -> None:
    sample, order = film(4, 2, 3, seed=6), torch.tensor([3, 0, 5, 1, 4, 2])
    view = token_view([sample], [15])
    moved = dataclasses.replace(view, hidden=view.hidden.view(1, 4, 6, WIDTH)[:, :, order].flatten(1, 2))
    (plain,), (other,) = kept(EVS(), view), kept(EVS(), moved)
    assert sorted(t // 6 * 6 + int(order[t % 6]) for t in other) == plain


def test_evs_says_what_it_cannot_reach() -> None:
    with pytest.raises(
        BudgetError, match=r"cannot reach 144 of 576 .*at least 576.*whole, all of this prompt; use"
    ) as e:
        EVS().plan(LLAVA, Budget(0.25))
    assert e.value.floor == 576
    filmed = LLAVA.for_prompt(800, 20, 1, opening=100)
    with pytest.raises(BudgetError, match=r"cannot reach 64 of 800 .*Ask for 100 or more.*100 tokens of this prompt"):
        EVS().plan(filmed, Budget(64))
    with pytest.raises(BudgetError, match="evs needs a budget"):
        EVS().plan(filmed, Budget(None))
    assert EVS().plan(filmed, Budget(0.25)).stages[0].keep == 200
    assert EVS().plan(filmed, Budget(100)).stages[0].keep == 100
    share = EVS().plan(filmed, Budget.make(flops=0.5)).stages[0].keep
    assert 300 < share < 450
    with pytest.raises(BudgetError, match="prefill FLOPs"):
        EVS().plan(filmed, Budget.make(flops=0.05))


# VidCom2


def test_vidcom2_by_hand() -> None:
    """Four tokens in two frames; the two channels that vary least are 0 and 1, the others are 0 or huge."""
    view = token_view([film(2, 1, 2)], [2])
    states = torch.zeros(1, 4, 4)
    states[0, :, :2] = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    states[0, :, 2:] = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0], [0.0, -9.0]])
    view = dataclasses.replace(view, hidden=states)
    # middle of the video (3/4, 1/4): squared distances 1/8 of the first three, 9/8 of the last; middle of frame 0 is
    # its tokens, that of frame 1 (1/2, 1/2), 1/2 away from both
    scorer = VidCom2(scales=(0.5,))
    near, far, half = math.exp(-1 / 8), math.exp(-9 / 8), math.exp(-1 / 2)
    want = torch.tensor([[near + 1.0, near + 1.0, near + half, far + half]], dtype=torch.float64)
    torch.testing.assert_close(-scorer.score(view), want, atol=2e-6, rtol=0)
    # frame 1 is far less like the video: R (1 + p - 1/2) is 1/4 and 3/4, of 2 tokens 0.5 and 1.5; each gets its one
    assert kept(scorer, view) == [[0, 3]]
    assert kept(scorer, dataclasses.replace(view, keep=torch.tensor([3]))) == [[0, 2, 3]]


@pytest.mark.parametrize("share", [0.3, 0.45])
@pytest.mark.parametrize("scorer", [VidCom2(), VidCom2(temperature=0.1, scales=(0.3, 4.0))], ids=str)
def test_vidcom2_equals_the_rule(share: float, scorer: VidCom2) -> None:
    counts = [round(share * s.total) for s in FILMS]
    view = token_view(FILMS, counts)
    want = [
        vidcom2_keeps(as_spots(s), s.normal("hidden", s.total, WIDTH), n, scorer.temperature, scorer.scales)
        for s, n in zip(FILMS, counts, strict=True)
    ]
    assert kept(scorer, view) == want
    assert [len(tokens) for tokens in want] == counts


def test_frames_get_quotas_worked_by_hand() -> None:
    # 9 of 18 tokens in 3 frames of 6: R = 1/2, and all the softmax goes to the last: 3 (2/3, 2/3, 5/3)
    assert frame_quotas(9, [6, 6, 6], [0.9, 0.8, 0.1], 0.01) == [2, 2, 5]
    assert frame_quotas(9, [6, 6, 6], [0.5, 0.5, 0.5], 0.01) == [3, 3, 3]
    # 7 (2/9, 2/9, 5/9) is 1.6, 1.6 and 3.9: the largest remainders are made whole, of equal ones the first
    assert frame_quotas(7, [4, 4, 4], [0.9, 0.8, 0.1], 0.01) == [2, 1, 4]
    # 11 (2/9, 2/9, 5/9) is more than the last frame has
    assert frame_quotas(11, [4, 4, 4], [0.9, 0.8, 0.1], 0.01) == [4, 3, 4]
    assert frame_quotas(12, [4, 4, 4], [0.9, 0.8, 0.1], 0.01) == [4, 4, 4]
    # each gets one while there are enough, and then the most unusual
    assert frame_quotas(4, [9, 9, 9, 9], [0.4, 0.3, 0.2, 0.1], 0.01) == [1, 1, 1, 1]
    # 5 (1/28, 27/28) is 0.2 and 4.8: a frame of which little is left keeps its one
    assert frame_quotas(5, [2, 18], [0.9, 0.1], 0.01) == [1, 4]
    assert frame_quotas(2, [9, 9, 9, 9], [0.4, 0.3, 0.2, 0.1], 0.1) == [0, 0, 1, 1]
    assert frame_quotas(0, [3, 3], [0.4, 0.3], 0.01) == [0, 0]


def test_an_unusual_frame_keeps_more() -> None:
    view = token_view([film(5, 2, 4, seed=7)], [20])
    hidden = (view.hidden[:, :8].repeat(1, 5, 1) + 1e-3 * view.hidden).clone()
    hidden[:, 16:24] = view.hidden[:, 16:24]
    (tokens,) = kept(VidCom2(), dataclasses.replace(view, hidden=hidden))
    counts = [sum(t // 8 == frame for t in tokens) for frame in range(5)]
    assert counts[2] == max(counts) > 4
    even = kept(VidCom2(), dataclasses.replace(view, hidden=view.hidden[:, :8].repeat(1, 5, 1)))[0]
    assert [sum(t // 8 == frame for t in even) for frame in range(5)] == [4] * 5


def test_vidcom2_does_not_mind_where_in_the_frame_things_are() -> None:
    sample, order = film(4, 2, 3, seed=6), torch.tensor([3, 0, 5, 1, 4, 2])
    view = token_view([sample], [10])
    moved = dataclasses.replace(view, hidden=view.hidden.view(1, 4, 6, WIDTH)[:, :, order].flatten(1, 2))
    (plain,), (other,) = kept(VidCom2(), view), kept(VidCom2(), moved)
    assert sorted(t // 6 * 6 + int(order[t % 6]) for t in other) == plain


def test_any_score_takes_the_frames_of_vidcom2() -> None:
    view = token_view([film(3, 2, 3, seed=8)], [8])
    quotas = [sum(t // 6 == frame for t in kept(VidCom2(), view)[0]) for frame in range(3)]
    scores = torch.arange(18.0)[None]
    mask = Frames().select(view, scores)[0].view(3, 6)
    assert mask.sum(1).tolist() == quotas
    assert all(row.tolist() == sorted(row.tolist()) for row in mask)
    (stage,) = vtprune.DivPrune().plan(LLAVA, Budget(64)).stages
    with pytest.raises(PlanError, match="frames needs a score for every token, but divprune chooses a set"):
        dataclasses.replace(stage, selection=Frames())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"temperature": 0}, "temperature must be a number > 0, got 0. The authors use 0.01"),
        ({"temperature": math.nan}, "temperature must be a number > 0, got nan"),
        ({"scales": ()}, r"scales must be a tuple of numbers > 0, got \(\)"),
        ({"scales": (1.0, -2.0)}, r"scales must be a tuple of numbers > 0, got \(1.0, -2.0\)"),
    ],
)
@pytest.mark.parametrize("kind", [VidCom2, Frames])
def test_knobs_of_vidcom2(kind: type, knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=f"{kind.name} {message}"):
        kind(**knobs)


# uniform frames


def test_uniform_frames_by_hand() -> None:
    view = token_view([film(7, 2, 2)] * 5, [12, 9, 3, 28, 1])
    # three of seven frames are the middles of thirds: 1, 3 and 5; nine tokens leave one of frame 5, by the even grid
    assert kept(UniformFrames(), view) == [
        [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23],
        [4, 5, 6, 7, 12, 13, 14, 15, 23],
        [13, 14, 15],
        list(range(28)),
        [15],
    ]


def test_uniform_frames_of_films_and_images() -> None:
    # 15 tokens dealt to 12, 6 and 12: 6, 3 and 6. Of the first film frames 0 and 2, the second an even row; of the
    # other frame 1; the image is an even grid
    sample = together(film(3, 2, 2), still(2, 3), film(2, 2, 3))
    view = token_view([sample], [15])
    image = vtprune.Uniform().select(token_view([still(2, 3)], [3]))[0].nonzero()[:, 0] + 12
    assert kept(UniformFrames(), view) == [[0, 1, 2, 3, 10, 11, *image.tolist(), *range(24, 30)]]


def test_uniform_frames_pass_over_what_is_gone() -> None:
    sample = dataclasses.replace(film(4, 1, 3), gone=(3, 4, 5, 7))
    # frame 1 is gone and frame 2 has two tokens: frames 0, 2 and 3 are left
    assert kept(UniformFrames(), token_view([sample], [2])) == [[6, 8]]
    assert kept(UniformFrames(), token_view([sample], [5])) == [[0, 1, 2, 9, 11]]


@pytest.mark.parametrize("scorer", [EVS(), VidCom2(), UniformFrames(), Frames()], ids=lambda s: s.name)
def test_counts_hold_and_batch_mates_do_not_matter(scorer: Scorer) -> None:
    for share in (0.2, 0.7, 1.0):
        counts = [max(1, round(share * s.total)) for s in FILMS]
        chosen = [pick(scorer, [s], [n])[0] for s, n in zip(FILMS, counts, strict=True)]
        assert [len(tokens) for tokens in chosen] == counts
        assert pick(scorer, list(FILMS), counts) == chosen


def pick(scorer: Scorer | Frames, samples: list[Sample], counts: list[int]) -> list[list[int]]:
    view = token_view(samples, counts)
    if isinstance(scorer, Frames):
        scores = torch.full(view.valid.shape, math.nan)
        for b, s in enumerate(samples):
            scores[b, : s.total] = s.normal("score", s.total)
        return [row.nonzero()[:, 0].tolist() for row in scorer.select(view, scores)]
    return kept(scorer, view)


@pytest.mark.parametrize("name", ["evs", "vidcom2", "uniform-frames"])
def test_towers_are_refused(name: str) -> None:
    from models import llava

    plan = Plan((Stage(Site("vision", 2), vtprune.contract.METHODS[name](), 16),))
    with pytest.raises(PlanError, match=rf"{name} compares the frames of a film; it cannot cut at vision\[2\]"):
        vtprune.prune(llava(), plan)
