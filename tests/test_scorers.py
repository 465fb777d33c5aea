"""The contract of every registered method, and what is special about the baselines and DivPrune."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator

import pytest
import torch
from learned import BUDGETED, ready
from scorer_views import LLAVA, WIDTH, Sample, seen, token_view
from torch import Tensor

from vtprune import similarity
from vtprune.budget import Budget
from vtprune.cells import grid_cells, sample_cells, split_in_proportion
from vtprune.contract import METHODS, Scorer
from vtprune.cost import plan_cost
from vtprune.errors import BudgetError, PlanError, UnknownNameError
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.plan import Plan
from vtprune.scorers.divprune import DivPrune
from vtprune.scorers.pool import Pool
from vtprune.scorers.random_tokens import Random
from vtprune.scorers.uniform import Uniform

# ragged on purpose: two images, one image, a single token, some tokens already gone
SAMPLES = (
    Sample(((3, 4), (2, 2)), seed=1),
    Sample(((5, 5),), seed=2, text=9),
    Sample(((1, 1),), seed=3),
    Sample(((4, 4),), seed=4, gone=(0, 3, 4, 9)),
)
KEEP = (5, 7, 1, 6)

every_method = pytest.mark.parametrize("name", BUDGETED)
registered = pytest.mark.parametrize("name", list(METHODS))


def run(scorer: Scorer, samples: tuple[Sample, ...], keep: tuple[int, ...], **options: typing.Any) -> list[list[int]]:
    """Original indices of the survivors of each sample, checked against the contract."""
    view = seen(scorer, samples, keep, **options)
    kept = scorer.select(view)
    assert kept.dtype == torch.bool
    assert kept.shape == view.valid.shape
    assert not (kept & ~view.valid).any()
    if scorer.merges:
        owner = scorer.assign(view, kept)
        assert owner.shape == kept.shape
        own = torch.arange(kept.shape[1]).expand_as(kept)
        assert torch.equal(owner[kept], own[kept]), "a kept token must own itself"
    return [view.original[b][kept[b]].tolist() for b in range(len(samples))]


@every_method
def test_keeps_the_right_number_of_alive_tokens(name: str) -> None:
    kept = run(ready(name), SAMPLES, KEEP)
    assert [len(tokens) for tokens in kept] == list(KEEP)
    for sample, tokens in zip(SAMPLES, kept, strict=True):
        assert set(tokens) <= set(sample.alive)


@every_method
def test_keep_all_is_the_identity(name: str) -> None:
    keep = tuple(len(s.alive) for s in SAMPLES)
    assert run(ready(name), SAMPLES, keep) == [s.alive for s in SAMPLES]
    if METHODS[name].merges:
        scorer, view = ready(name), seen(ready(name), SAMPLES, keep)
        owner = scorer.assign(view, scorer.select(view))
        assert torch.equal(merge_tokens(view.hidden, owner, view.valid)[view.valid], view.hidden[view.valid])


@every_method
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    scorer = ready(name)
    alone = [run(scorer, (s,), (k,))[0] for s, k in zip(SAMPLES, KEEP, strict=True)]
    assert run(scorer, SAMPLES, KEEP) == alone
    assert run(scorer, SAMPLES[::-1], KEEP[::-1]) == alone[::-1]
    longer = (*SAMPLES, Sample(((7, 9),), seed=8))
    assert run(scorer, longer, (*KEEP, 63))[:4] == alone


@every_method
def test_padding_content_is_never_read(name: str) -> None:
    scorer = ready(name)
    clean = run(scorer, SAMPLES, KEEP, poison=0.0)
    for poison in (math.nan, 1e4, -1e4):
        assert run(scorer, SAMPLES, KEEP, poison=poison) == clean


@every_method
def test_a_sample_without_visual_tokens_is_left_alone(name: str) -> None:
    scorer = ready(name)
    alone = run(scorer, SAMPLES[:2], KEEP[:2])
    assert run(scorer, (SAMPLES[0], Sample(()), SAMPLES[1]), (KEEP[0], 0, KEEP[1])) == [alone[0], [], alone[1]]


@every_method
def test_one_token(name: str) -> None:
    assert run(ready(name), (Sample(((1, 1),)),), (1,)) == [[0]]


@every_method
def test_scores_are_finite_and_ties_go_to_the_earlier_token(name: str) -> None:
    scorer = ready(name)
    view = seen(scorer, SAMPLES, KEEP)
    if type(scorer).score is not Scorer.score:
        scores = scorer.score(view)
        assert scores.shape == view.valid.shape
        assert scores[view.valid].isfinite().all()
    # these know places on the grid, or chance
    if name in ("random", "uniform", "uniform-frames", "pool", "atp", "prumerge-plus"):
        return
    # a convolution sees where the sequence ends; pairs are of even and odd places; crops and frames have quotas
    if name in ("relevance", "vispruner", "holov", "tome", "vidcom2"):
        return
    flat = {key: torch.ones_like(signal) for key, signal in view.memory.items()}
    same = dataclasses.replace(view, hidden=torch.ones_like(view.hidden), memory=flat)
    kept = scorer.select(same)
    assert torch.equal(kept, torch.arange(kept.shape[1])[None] < view.keep[:, None])


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    scorer = ready(name)
    kept = run(scorer, SAMPLES, KEEP, dtype=dtype)
    assert [len(tokens) for tokens in kept] == list(KEEP)
    memory = seen(scorer, SAMPLES, KEEP, dtype=dtype, poison=0.0).memory
    assert all(signal.dtype == torch.float32 and signal.isfinite().all() for signal in memory.values())


@every_method
def test_is_deterministic_and_leaves_the_global_generator_alone(name: str) -> None:
    scorer = ready(name)
    before = torch.random.get_rng_state()
    first = run(scorer, SAMPLES, KEEP)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert run(scorer, SAMPLES, KEEP) == first


@every_method
def test_inputs_are_not_modified(name: str) -> None:
    scorer = ready(name)
    view = seen(scorer, SAMPLES, KEEP)
    tensors = [getattr(view, f.name) for f in dataclasses.fields(view)]
    tensors = [t for t in tensors if isinstance(t, Tensor)] + list(view.memory.values())
    before = [t.clone() for t in tensors]
    kept = scorer.select(view)
    if scorer.merges:
        scorer.assign(view, kept)
    kept.fill_(False)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, before, strict=True))


# plans

BUDGETS = [Budget.make(192), Budget.make(0.25), Budget.make(flops=0.5), Budget.make(1.0)]


def out_of_reach(method: Scorer, budget: Budget) -> float | None:
    """What a method needs at least, if that is more than the budget."""
    try:
        method.plan(LLAVA, budget)
    except BudgetError as error:
        return error.floor
    return None


@every_method
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_plan_spends_the_budget(name: str, budget: Budget) -> None:
    assert isinstance(budget.value, (int, float))
    floor = out_of_reach(ready(name), budget)
    if floor is not None:
        # methods whose first layers see everything say what they need, and can spend that
        unit = 576 if isinstance(budget.value, float) and budget.basis == "average" else 1
        assert floor > budget.value * unit
        budget = Budget(math.ceil(floor)) if budget.basis == "average" else Budget.make(flops=floor)
    plan = ready(name).plan(LLAVA, budget)
    cost = plan_cost(plan, LLAVA, budget.basis)
    assert isinstance(budget.value, (int, float))
    if budget.basis == "flops":
        assert cost == pytest.approx(budget.value, abs=0.02)
    else:
        share = isinstance(budget.value, float)
        assert cost == pytest.approx(budget.value * 576 if share else budget.value, abs=1.0)
    assert Plan.from_dict(plan.to_dict()) == plan


@every_method
def test_plan_needs_a_budget_that_exists(name: str) -> None:
    if not METHODS[name].adaptive:
        with pytest.raises(BudgetError, match=f"{name} needs a budget: pass keep=64"):
            ready(name).plan(LLAVA, Budget(None))
    with pytest.raises(BudgetError, match=r"keep must be in \[1, 576\], got 577"):
        ready(name).plan(LLAVA, Budget(577))


# knobs


def other_values(annotation: typing.Any, default: typing.Any) -> Iterator[typing.Any]:
    """Values of a knob's type that differ from its default."""
    for kind in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(kind) is typing.Literal:
            yield from (v for v in typing.get_args(kind) if v != default)
    if isinstance(default, tuple):
        yield tuple(v + 1 for v in default)
        yield tuple(v / 2 for v in default)
    yield from ((1, 2, 3), (0.25,))
    boolean = bool in (annotation, *typing.get_args(annotation))
    yield from (v for v in ([True, False] if boolean else [3, 0.25, 1, (1, 2), "a"]) if v != default)


def accepted(name: str, field: dataclasses.Field[typing.Any]) -> Scorer:
    annotation = typing.get_type_hints(METHODS[name])[field.name]
    for value in other_values(annotation, field.default):
        try:
            return METHODS[name](**{field.name: value})
        except PlanError:
            continue
    raise AssertionError(f"no value other than {field.default!r} fits {name}.{field.name}: teach other_values one")


@registered
def test_every_knob_survives_json(name: str) -> None:
    assert Scorer.from_dict(METHODS[name]().to_dict()) == METHODS[name]()
    for field in dataclasses.fields(METHODS[name]):
        scorer = accepted(name, field)
        assert getattr(scorer, field.name) != field.default
        assert Scorer.from_dict(scorer.to_dict()) == scorer != METHODS[name]()


@registered
def test_listing_and_unknown_knobs(name: str) -> None:
    assert METHODS[name].name == name
    assert METHODS[name].summary
    assert "\n" not in METHODS[name].summary
    with pytest.raises(PlanError, match=r"got \['tempo'\] beside them"):
        Scorer.from_dict({"name": name, "tempo": 3})


def test_unknown_method_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown method 'divprun'. Did you mean 'divprune'\?"):
        METHODS["divprun"]


# cells


def n_bands(rows: int, cols: int, n: int) -> int:
    """The written rule: sqrt(n R / C) rounded, held between ceil(n / C) and min(n, R)."""
    return max(math.ceil(n / cols), min(n, rows, math.floor(math.sqrt(n * rows / cols) + 0.5)))


GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5), (6, 4), (13, 9)]


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_cells_tile_the_grid_with_rectangles(rows: int, cols: int) -> None:
    for n in range(1, rows * cols + 1):
        cells = grid_cells(rows, cols, n)
        assert len(cells.centre) == n
        assert list(cells.centre) == sorted(set(cells.owner))
        bands: dict[int, list[int]] = {}
        for centre in cells.centre:
            mine = [divmod(t, cols) for t, owner in enumerate(cells.owner) if owner == centre]
            height, width = (len({t[axis] for t in mine}) for axis in (0, 1))
            assert len(mine) == height * width
            assert divmod(centre, cols) in mine
            bands.setdefault(min(t[0] for t in mine), []).append(width)
            assert height in (rows // n_bands(rows, cols, n), -(-rows // n_bands(rows, cols, n)))
        assert len(bands) == n_bands(rows, cols, n)
        assert all(max(widths) - min(widths) <= 1 for widths in bands.values())
        counts = [len(widths) for widths in bands.values()]
        assert max(counts) - min(counts) <= 1


def test_cells_are_square_where_they_can_be() -> None:
    assert grid_cells(4, 4, 4).centre == (5, 7, 13, 15)
    assert grid_cells(24, 24, 64).centre == tuple(24 * r + c for r in range(1, 24, 3) for c in range(1, 24, 3))
    assert grid_cells(3, 4, 12).centre == tuple(range(12))
    # 5 of 4 x 4: two bands of two and three columns
    assert grid_cells(4, 4, 5).centre == (5, 7, 12, 13, 15)


def test_shares_are_dealt_by_largest_remainder() -> None:
    assert split_in_proportion(10, [576, 576, 288]) == [4, 4, 2]
    assert split_in_proportion(4, [5, 5, 5]) == [2, 1, 1]
    assert split_in_proportion(1, [3, 9]) == [0, 1]
    assert split_in_proportion(0, []) == []
    for sizes in ([1, 50, 3], [7, 7], [2, 1, 1, 1]):
        for n in range(sum(sizes) + 1):
            shares = split_in_proportion(n, sizes)
            assert sum(shares) == n
            assert all(share <= size for share, size in zip(shares, sizes, strict=True))
            assert all(abs(share - n * size / sum(sizes)) < 1 for share, size in zip(shares, sizes, strict=True))


def test_cells_of_an_image_that_lost_tokens_are_even_runs() -> None:
    cells = sample_cells(((2, 2), (3, 3)), (4, 6), 5)
    assert cells.centre == (2, 3, 5, 7, 9)
    assert cells.owner == (2, 3, 2, 3, 5, 5, 7, 7, 9, 9)
    nothing_for_the_first = sample_cells(((1, 2), (2, 4)), (2, 8), 1)
    assert nothing_for_the_first.centre == (8,)
    assert nothing_for_the_first.owner == (0, 1, *[8] * 8)


# baselines


def test_random_follows_seed_and_prompt_only() -> None:
    sample = Sample(((6, 6),), seed=5)
    view = token_view([sample], [9])
    other_image = dataclasses.replace(view, hidden=torch.zeros_like(view.hidden))
    other_prompt = dataclasses.replace(view, text_key=((9, 9, 9),))
    kept = Random().select(view)
    assert torch.equal(Random().select(other_image), kept)
    assert not torch.equal(Random().select(other_prompt), kept)
    assert not torch.equal(Random(seed=1).select(view), kept)
    # a fixed pattern, so that runs on other machines and releases can be compared
    pattern = Random().select(dataclasses.replace(view, text_key=((1, 2, 3),)))[0]
    assert pattern.nonzero()[:, 0].tolist() == [0, 12, 14, 18, 19, 26, 30, 32, 35]


def test_random_does_not_shift_when_tokens_are_gone() -> None:
    whole = Random().score(token_view([Sample(((6, 6),))], [9]))[0]
    part = Sample(((6, 6),), gone=(0, 7, 20))
    assert torch.equal(Random().score(token_view([part], [9]))[0], whole[part.alive])


def test_random_is_uniform_over_tokens() -> None:
    hits = torch.zeros(16)
    for seed in range(400):
        hits += Random(seed=seed).select(token_view([Sample(((4, 4),))], [4]))[0]
    # 400 draws at 1/4: mean 100, standard deviation 8.7
    assert (hits - 100).abs().max() < 40


def test_uniform_splits_over_images_and_falls_back_to_a_stride() -> None:
    kept = run(Uniform(), (Sample(((4, 4), (2, 4))), Sample(((4, 4),), gone=(1, 2))), (6, 7))
    assert kept[0] == [5, 7, 13, 15, 21, 23]
    assert kept[1] == [3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize(("side", "out"), [(8, 4), (6, 6), (9, 3), (5, 1)])
def test_pool_is_adaptive_average_pooling_where_the_grid_divides(side: int, out: int) -> None:
    view = token_view([Sample(((side, side),))], [out * out])
    kept = Pool().select(view)
    merged = merge_tokens(view.hidden, Pool().assign(view, kept), view.valid)[kept]
    image = view.hidden.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    want = torch.nn.functional.adaptive_avg_pool2d(image, out)[0].flatten(1).T
    torch.testing.assert_close(merged, want)


def test_pool_conserves_the_mean_of_every_image() -> None:
    samples = [Sample(((3, 4), (2, 2)), seed=1), Sample(((4, 4),), gone=(2,))]
    view = token_view(samples, [5, 4], poison=0.0)
    kept = Pool().select(view)
    owner = Pool().assign(view, kept)
    merged = merge_tokens(view.hidden, owner, view.valid)
    for b in range(2):
        cell = (owner[b][None] == torch.arange(owner.shape[1])[:, None]) & view.valid[b]
        weight = cell.sum(1)[:, None]
        torch.testing.assert_close((merged[b] * weight).sum(0), view.hidden[b][view.valid[b]].sum(0))


# DivPrune


def greedy_reference(states: Tensor, keep: int) -> list[int]:
    """The formula with the whole matrix, one sample, float64."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    n = len(states)
    nearest = [min(float(distance[i, j]) for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: nearest[i])]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("block", [1 << 22, 50])
def test_divprune_equals_the_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", block)
    samples = (Sample(((5, 6),), seed=1), Sample(((3, 3),), seed=2), Sample(((7, 3),), seed=3))
    for keep in ((1, 1, 1), (2, 8, 20), (12, 3, 7)):
        want = [greedy_reference(s.normal("hidden", s.total, WIDTH), k) for s, k in zip(samples, keep, strict=True)]
        assert run(DivPrune(), samples, keep) == want


def test_divprune_on_angles_worked_out_by_hand() -> None:
    degrees = torch.tensor([0.0, 1.0, 90.0, 100.0, 181.0]).deg2rad()
    view = token_view([Sample(((1, 5),))], [1])
    states = torch.zeros(1, 5, WIDTH)
    states[0, :, 0], states[0, :, 1] = 3 * degrees.cos(), 3 * degrees.sin()
    # 181 is farthest from its nearest (81 degrees); then 1, opposite to it; then 90 (89 away), 100 and 0
    order = [4, 1, 2, 3, 0]
    for keep in range(1, 6):
        cut = dataclasses.replace(view, hidden=states, keep=torch.tensor([keep]))
        assert DivPrune().select(cut)[0].nonzero()[:, 0].tolist() == sorted(order[:keep])


def test_divprune_takes_duplicates_last_and_survives_zero_vectors() -> None:
    view = token_view([Sample(((1, 8),), seed=3)], [4])
    hidden = view.hidden.clone()
    hidden[0, 4:] = hidden[0, :1] * torch.tensor([[1.0], [2.0], [0.5], [7.0]])
    cut = dataclasses.replace(view, hidden=hidden)
    kept = DivPrune().select(cut)[0]
    assert kept[1:4].all()
    assert kept[[0, 4, 5, 6, 7]].sum() == 1
    zeros = dataclasses.replace(view, hidden=torch.zeros_like(hidden))
    assert DivPrune().select(zeros)[0].tolist() == [True] * 4 + [False] * 4


def test_random_seed_must_be_an_int() -> None:
    with pytest.raises(PlanError, match=r"random seed must be an int, got 0.5"):
        Random(seed=0.5)  # pyright: ignore[reportArgumentType]
