"""ToMe: pairs by hand and by a slow rule, and towers whose merged tokens are copies of each other instead.

The oracle of proportional attention knows no logarithm: in an unpruned tower every member of a merged token holds the
mean of all of them after each block, so that each is a key as often as the merged token stands for tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from family_models import CASES, LAYERS, Case
from family_models import Row as Media
from models import Row, batch, llava
from oracle import hidden_keys, masked
from scorer_views import LLAVA, Sample, seen, token_view
from test_selections import plane
from torch import Tensor
from tower_cases import blocks_of
from tower_oracle import encoded, turned

import vtprune
from vtprune.budget import Budget
from vtprune.errors import PlanError, UnsupportedModelError
from vtprune.hooks.families.base import family_of
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.tome import ToMe, match_pairs

EXACT = {"atol": 2e-5, "rtol": 2e-5}


def pairs(metric: Tensor, keep: int, size: Tensor | None = None) -> tuple[list[int], list[int]]:
    """The survivors and the owner of each of the tokens [n, d]."""
    valid = torch.ones(1, len(metric), dtype=torch.bool)
    kept, owner = match_pairs(metric[None], valid, torch.tensor([keep]), None if size is None else size[None])
    return kept[0].nonzero()[:, 0].tolist(), owner[0].tolist()


def by_hand(metric: Tensor, keep: int, size: Tensor) -> tuple[list[int], list[int]]:
    """The rule one token at a time."""
    groups = {i: [i] for i in range(len(metric))}
    while len(groups) > keep:
        now = {
            o: sum(float(size[i]) * metric[i].double() for i in g) / sum(float(size[i]) for i in g)
            for o, g in groups.items()
        }
        order = sorted(groups)
        links = []
        for a in order[1::2]:
            cosine = {b: float(now[a] @ now[b] / now[a].norm() / now[b].norm()) for b in order[::2]}
            best = max(cosine, key=cosine.__getitem__)
            links.append((cosine[best], a, best))
        for _, a, b in sorted(links, reverse=True)[: len(groups) - keep]:
            groups[b] += groups.pop(a)
    return sorted(groups), [next(o for o, g in groups.items() if i in g) for i in range(len(metric))]


def test_four_tokens_by_hand() -> None:
    metric = plane(0, 50, 90, 80)[0]
    # 50 degrees is 40 from 90 and 50 from 0; 80 is 10 from 90: the second link is the stronger one
    assert pairs(metric, 3) == ([0, 1, 2], [0, 1, 2, 2])
    assert pairs(metric, 2) == ([0, 2], [0, 2, 2, 2])
    # then 90 would be token 1 of two, and goes to 0 with all it has taken in
    assert pairs(metric, 1) == ([0], [0, 0, 0, 0])
    assert pairs(metric, 4) == ([0, 1, 2, 3], [0, 1, 2, 3])
    # equal tokens: the later link breaks no tie before the earlier stays
    same = torch.ones(6, 4)
    assert pairs(same, 5) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0])
    assert pairs(same[:1], 1) == ([0], [0])


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 13, 20, 24, 25])
def test_it_equals_the_rule(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    for number in (25, 18):
        metric = torch.randn(number, 8, generator=generator)
        size = torch.randint(1, 5, (number,), generator=generator).float()
        assert pairs(metric, min(keep, number), size) == by_hand(metric, min(keep, number), size)


def test_batch_mates_sizes_and_sums() -> None:
    samples = (Sample(((5, 5),), seed=1), Sample(((3, 3),), seed=2), Sample(((4, 4),), seed=3, gone=(0, 5, 6)))
    view = seen(ToMe(), samples, (7, 2, 6))
    size = torch.arange(1.0, 26.0).expand(3, -1)
    kept, owner = match_pairs(view.memory["metric"], view.valid, view.keep, size)
    for b, sample in enumerate(samples):
        n = len(sample.alive)
        assert pairs(view.memory["metric"][b, :n], int(view.keep[b]), size[b, :n]) == (
            kept[b].nonzero()[:, 0].tolist(),
            owner[b, :n].tolist(),
        )
    # nothing gets lost
    hidden = view.hidden.nan_to_num()
    merged = merge_tokens(hidden, owner, view.valid, size)
    whole = torch.zeros(3, 25).scatter_add(1, owner, size * view.valid)
    for b in range(3):
        mine = kept[b]
        total = (merged[b] * whole[b][:, None])[mine].sum(0)
        torch.testing.assert_close(total, (hidden[b] * size[b][:, None])[view.valid[b]].sum(0), atol=1e-3, rtol=1e-4)


def test_the_line_of_counts() -> None:
    for keep in (185, 116, 70, 64, 7):
        plan = ToMe().plan(LLAVA, Budget(keep))
        assert [s.site for s in plan.stages] == [Site("vision", k) for k in range(23)]
        counts = [576, *(s.count(576) for s in plan.stages)]
        assert counts[-1] == keep
        assert all(-(-a // 2) <= b <= a for a, b in itertools.pairwise(counts))
    # the paper's r = 17, 20 and 22 are even
    for keep, r in ((185, 17), (116, 20), (70, 22)):
        counts = [576, *(s.count(576) for s in ToMe().plan(LLAVA, Budget(keep)).stages)]
        assert [a - b for a, b in itertools.pairwise(counts)] == [r] * 23
    shares = ToMe().plan(LLAVA, Budget(0.25))
    assert all(isinstance(s.keep, float) for s in shares.stages)
    assert (shares.stages[-1].keep, shares.stages[0].keep) == (0.25, 1 - 0.75 / 23)
    (end,) = ToMe(where="end").plan(LLAVA, Budget(64)).stages
    assert (end.site, end.keep) == (Site("vision", 22), 64)
    blind = dataclasses.replace(LLAVA, vision=None)
    with pytest.raises(UnsupportedModelError, match="tome merges tokens of the vision tower"):
        ToMe().plan(blind, Budget(64))


def test_where_it_is_refused() -> None:
    for knobs, message in (
        ({"where": "input"}, "where must be 'tower' or 'end', got 'input'"),
        ({"proportional": 1}, "proportional must be True or False, got 1"),
    ):
        with pytest.raises(PlanError, match=f"tome {message}"):
            ToMe(**knobs)
    model = llava()
    with pytest.raises(PlanError, match="tome reads attention, which does not exist yet at 'input'"):
        vtprune.prune(model, Plan((Stage(Site("input"), ToMe(), 4),)))
    config = model.model.vision_tower.config
    before, config._attn_implementation = config._attn_implementation, "flash_attention_2"
    try:
        with pytest.raises(UnsupportedModelError, match=r"tome weighs the keys .* 'flash_attention_2' cannot do"):
            vtprune.prune(model, "tome", 0.5)
        vtprune.prune(model, "tome(proportional=False)", 0.5).remove()
        vtprune.prune(model, "tome(where='end')", 0.5).remove()
    finally:
        config._attn_implementation = before
    with pytest.raises(
        PlanError, match=r"tome merges tokens at vision\[0\], but this model adds visual features again"
    ):
        vtprune.prune(CASES["qwen3_vl"].model(), "tome", 0.5)


# the tower of copies


@contextmanager
def copied(model: Any, case: Case, report: vtprune.Report, sizes: list[Any], *, turn: bool = True) -> Iterator[None]:
    """An unpruned tower in which the members of each merged token hold the mean of all of them after each block.

    Keys turn with the place (and lie in the window) of the token that was merged into.
    """
    tokens = encoded(case, "image", sizes, [True] * len(sizes)).tokens
    family = family_of(model.config)(model)
    tower, lead = family.parts().tower, blocks_of(case)[1]
    assert tower is not None
    undo: list[Any] = []
    groups: dict[int, Tensor] = {}
    for stage, record in enumerate(report.kept):
        start, whole = 0, []
        for b, number in enumerate(report.visual_tokens):
            whole.append(report.owners(b, stage) + start)
            start += number
        groups[record.site.index] = torch.cat(whole)
    last = max(groups)
    for block in range(last):
        # as it was behind the block before; nothing has merged before the first cut
        groups.setdefault(block, groups[block - 1] if block else torch.arange(len(tokens)))

    def mean(rows: Tensor, owner: Tensor) -> Tensor:
        """[T, ...] rows of all tokens -> the mean of each token's group."""
        same = (owner[:, None] == owner[None]).float()
        return torch.einsum("ts,s...->t...", same / same.sum(1, keepdim=True), rows)

    def place(width: int) -> Tensor:
        """[T, c] the row of each patch of each token in flattened states whose units are `width` rows wide."""
        padded = tower.packing == "padded"
        return torch.tensor([[u * width + lead + r if padded else r for u, r in token] for token in tokens])

    def after(block: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            flat, at = states.reshape(-1, states.shape[-1]).clone(), place(states.shape[-2])
            flat[at] = mean(flat[at], groups[block])
            flat = flat.view(states.shape)
            return (flat, *output[1:]) if isinstance(output, tuple) else flat

        return hook

    def owners_of_rows(block: int, total: int, width: int) -> Tensor:
        at, own = place(width), torch.arange(total)
        own[at] = at[groups[block]]
        return own

    def angles(block: int) -> Any:
        def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            turns = kwargs.get("position_embeddings")
            if turns is None or not turn:
                return None
            own = owners_of_rows(block - 1, turns[0].shape[-2], 0)
            return args, {**kwargs, "position_embeddings": tuple(t.index_select(-2, own) for t in turns)}

        return pre

    def dense(module: Any, block: int) -> Any:
        def forward(states: Tensor, *, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
            own = owners_of_rows(block - 1, len(states), 0)
            query, key, value = turned(module, states, position_embeddings)
            segment = torch.bucketize(torch.arange(len(states)), cu_seqlens[1:].long(), right=True)[own]
            logits = torch.einsum("qhd,khd->hqk", query, key) * module.scaling
            weights = logits.masked_fill(segment[:, None] != segment[None], float("-inf")).softmax(-1)
            return module.proj(torch.einsum("hqk,khd->qhd", weights, value).reshape(len(states), -1))

        return forward

    for k in range(last + (tower.packing == "segments")):
        undo.append(tower.blocks[k].register_forward_hook(after(k)).remove)
    for k in range(1, last + 1):
        module: Any = family.attention(tower.blocks[k])
        undo.append(module.register_forward_pre_hook(angles(k), with_kwargs=True).remove)
        if tower.packing == "segments":
            module.forward = dense(module, k)
            undo.append(lambda module=module: vars(module).pop("forward"))
    if tower.packing != "segments":

        def entering(module: Any, args: Any) -> Any:
            rows = args[0].reshape(-1, args[0].shape[-1])
            return (mean(rows, groups[last]).view(args[0].shape), *args[1:])

        entrance: Any = tower.entrance or tower.projector
        undo.append(entrance.register_forward_pre_hook(entering).remove)
    try:
        yield
    finally:
        for back in undo:
            back()


def check_copies(name: str, method: Any, keep: Any, attention: str = "sdpa") -> None:
    case = CASES[name]
    sizes = [1, 1] if isinstance(case.sizes[0], int) else list((case.tower_sizes or case.sizes)[:2])
    rows = tuple(Media((("image", size),), 3 - seed, 5, seed) for seed, size in enumerate(sizes))
    model, inputs = case.model(attention), case.batch(*rows)
    with vtprune.prune(model, method, keep) as session:
        logits, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    with copied(model, case, report, sizes), masked(model, hidden):
        want = model(**inputs).logits
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    # every original token is somewhere, and some stand for three or more
    for b in range(len(rows)):
        owners = report.owners(b)
        assert (owners >= 0).all()
        assert owners.bincount().max() >= 3
    again = Plan(tuple(dataclasses.replace(s, scorer=ToMe(proportional=False)) for s in session.plan.stages))
    with vtprune.prune(model, again):
        assert (model(**inputs).logits[seen] - want[seen]).abs().max() > 1e-4, "the oracle must notice the sizes"


@pytest.mark.parametrize("name", ["internvl", "llava", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl"])
@torch.no_grad()
def test_a_merged_token_weighs_as_much_as_its_copies(name: str) -> None:
    check_copies(name, "tome", 0.3)


@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen2_5_vl"])
@torch.no_grad()
def test_so_it_does_in_the_eager_backend(name: str) -> None:
    check_copies(name, "tome", 0.3, "eager")


@torch.no_grad()
def test_blocks_behind_the_last_merge_still_weigh() -> None:
    """A plan of one's own that merges once, early: no later stage would look at the blocks behind it."""
    stages = (Stage(Site("vision", 1), ToMe(), 5), Stage(Site("vision", 5), ToMe(), 5))
    check_copies("llava", Plan(stages), None)
    model, inputs = llava(), batch(Row())
    logits = []
    for scorer in (ToMe(), ToMe(proportional=False)):
        with vtprune.prune(model, Plan((Stage(Site("vision", 1), scorer, 5),))):
            logits.append(model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@torch.no_grad()
def test_keys_of_each_block_say_who_merges() -> None:
    """The pairs of each block from the keys of the tower of copies, by the slow rule."""
    case, keep = CASES["llava"], 4
    rows = (Media((("image", case.sizes[0]),), 3, 5, 0),)
    model, inputs, keys = case.model(), case.batch(*rows), {}
    with vtprune.prune(model, "tome", keep) as session:
        model(**inputs)
        report, plan = session.report, session.plan
    tower = model.model.vision_tower
    handles = [
        block.self_attn.k_proj.register_forward_hook(lambda m, a, out, k=k: keys.__setitem__(k, out[0]))
        for k, block in enumerate(tower.encoder.layers)
    ]
    with copied(model, case, report, [case.sizes[0]]):
        model(**inputs)
    for handle in handles:
        handle.remove()
    heads, total = tower.config.num_attention_heads, report.visual_tokens[0]
    owner = torch.arange(total)
    for stage, record in enumerate(report.kept):
        metric = keys[record.site.index][blocks_of(case)[1] :].unflatten(-1, (heads, -1)).mean(1)
        left = owner.unique()
        size = owner.bincount(minlength=total)[left].float()
        kept, into = by_hand(metric[left], plan.stages[stage].count(total), size)
        goes = torch.arange(total)
        goes[left] = left[torch.tensor(into)]
        owner = goes[owner]
        assert record.indices[0].tolist() == left[torch.tensor(kept)].tolist()
        assert torch.equal(report.owners(0, stage), owner)
    assert len(kept) == keep


@pytest.mark.parametrize("where", ["tower", "end"])
@torch.no_grad()
def test_exact_counts_and_batch_mates(where: str) -> None:
    model, rows = llava(), (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2))
    for share, counts in ((0.5, (8, 16)), (0.19, (3, 6)), (1 / 16, (1, 2))):
        with vtprune.prune(model, ToMe(where=where), share) as session:
            together, report = model(**batch(*rows)).logits, session.report
            assert [len(i) for i in report.kept[-1].indices] == [*counts, 0]
            for b in range(2):
                alone = model(**batch(rows[b])).logits[0]
                torch.testing.assert_close(together[b, -1], alone[-1], atol=1e-5, rtol=1e-5)
                assert report.owners(b).tolist() == session.report.owners(0).tolist()


def test_log_sizes_by_hand() -> None:
    """Two equal keys, one of which stands for three tokens: 3/4 and 1/4."""
    from vtprune.hooks.probe import _with_bias

    bias = torch.tensor([3.0, 1.0, 2.0]).log().view(1, 1, 1, 3)
    hidden = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    want = torch.tensor([0.75, 0.25, 0.0])
    assert _with_bias(None, bias) is bias
    for mask in (hidden, torch.zeros(1, 1, 1, 3).masked_fill(~hidden, torch.finfo(torch.float32).min)):
        torch.testing.assert_close(_with_bias(mask, bias).softmax(-1).flatten(), want)
    assert math.isclose(float(bias[0, 0, 0, 0]), math.log(3), rel_tol=1e-6)


def test_assign_follows_select() -> None:
    view = dataclasses.replace(token_view([Sample(((1, 4),))], [2]), memory={"metric": plane(0, 50, 90, 80)})
    kept = ToMe().select(view)
    assert kept[0].tolist() == [True, False, True, False]
    assert ToMe().assign(view, kept)[0].tolist() == [0, 2, 2, 2]


@torch.no_grad()
def test_a_cut_looks_for_pairs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stays and who owns whom come out of one search."""
    found = []
    monkeypatch.setattr("vtprune.scorers.tome.match_pairs", lambda *a: found.append(match_pairs(*a)) or found[-1])
    model = llava()
    with vtprune.prune(model, ToMe(where="end"), keep=10) as session:
        model(**batch(Row(1)))
    assert len(session.plan.stages) == len(found) == 1
