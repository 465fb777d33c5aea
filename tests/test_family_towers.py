"""Cuts inside the vision towers of every family that opens one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from family_checks import batch_equals_each_alone
from family_models import CASES, HOST_ENCODES_FIRST, LAYERS, Case, Row
from oracle import hidden_keys, masked, renumbered
from torch import Tensor
from tower_cases import NAMES, blocks_of, one_picture_each, ragged
from tower_oracle import gone, tower_masked, tower_of

import vtprune
from vtprune.contract import TokenView

GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def cuts(*wanted: tuple[int, float]) -> vtprune.Plan:
    """Cuts by a rule that reads no attention, at chosen blocks."""
    return vtprune.Plan(tuple(vtprune.Stage(vtprune.Site("vision", k), vtprune.Random(), n) for k, n in wanted))


@dataclass(frozen=True)
class Uneven(vtprune.Random):
    """Cuts another number of tokens from every picture, crop or frame, and none from every third."""

    name: ClassVar[str] = "uneven"

    def count(self, view: TokenView) -> Tensor:
        number, alive = torch.arange(len(view.keep)), view.valid.sum(1)
        return torch.where(number % 3 == 0, alive, (view.keep + number).minimum(alive))


UNEVEN = vtprune.Plan(
    (
        vtprune.Stage(vtprune.Site("vision", 0), Uneven(), 0.3, adaptive=True),
        vtprune.Stage(vtprune.Site("vision", 2), vtprune.Random(), 0.3),
    )
)
TOWER = vtprune.FlowCut(text_cut=False)
METHODS = [
    # with the cut in the decoder where the family has it, and on every family
    ("flowcut", 0.4, "sdpa"),
    (vtprune.FlowCut(text_cut=True), 0.4, "eager"),
    (TOWER, 0.4, "eager"),
    ([TOWER, "fastv"], [0.6, 0.4], "sdpa"),
    (cuts((0, 0.7), (2, 0.3)), None, "sdpa"),
    (UNEVEN, None, "sdpa"),
    (UNEVEN, None, "eager"),
]
IDS = ["flowcut", "flowcut-text-eager", "tower-eager", "tower+fastv", "two cuts", "uneven", "uneven-eager"]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def check_oracle(case: Case, rows: tuple[Row, ...], method: Any, keep: Any, attention: str = "sdpa") -> None:
    model, inputs = case.model(attention), case.batch(*rows)
    with vtprune.prune(model, method, keep) as session:
        logits, forward = model(**inputs).logits, session.report
        out, report = model.generate(**inputs, **GREEDY), session.report
    for a, b in zip(report.kept, forward.kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))
    assert report.kept[0].site.kind == "vision"
    blocks, lead = blocks_of(case)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    lost = gone(case, rows, report, blocks)
    with tower_masked(model, lost, lead), masked(model, hidden), renumbered(model, session.plan, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    for got, wanted in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)

    with masked(model, hidden), renumbered(model, session.plan, hidden):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-3, "the oracle must notice when nothing is hidden in the tower"


@pytest.mark.parametrize(("method", "keep", "attention"), METHODS, ids=IDS)
@torch.no_grad()
def test_tower_cut_equals_masked_tower(case: Case, method: Any, keep: Any, attention: str) -> None:
    check_oracle(case, ragged(case), method, keep, attention)


@torch.no_grad()
def test_videos_equal_masked_tower(case: Case) -> None:
    if not case.videos:
        pytest.skip("no videos of their own kind")
    if case.name == "llava_onevision":
        pytest.skip("refused: see test_mixtures_of_patches_are_refused")
    rows = (
        Row((("video", case.videos[0]),), 3, 5, 0),
        Row((("image", ragged(case)[3].media[0][1]) if case.mixes else ("video", case.videos[1]),), 1, 3, 4),
    )
    check_oracle(case, rows, "flowcut", 0.4)


@torch.no_grad()
def test_batch_and_neighbours_change_nothing(case: Case) -> None:
    batch_equals_each_alone(case, case.model(), ragged(case), "flowcut", 0.4)


@torch.no_grad()
def test_neighbours_in_a_prompt_change_nothing(case: Case) -> None:
    if case.name == "llava_onevision":
        pytest.skip("the host cuts an image into crops if it is alone, and not if it is one of several")
    model, (first, second, _) = case.model(), case.tower_sizes or case.sizes
    pair = case.batch(Row((("image", first), ("image", second)), seed=1))
    # the same picture (seed 11), alone
    lone = case.batch(Row((("image", second),), seed=2)) | case.encode([("image", second, 11)], [1])[0]
    with vtprune.prune(model, "flowcut", 0.4) as session:
        model(**pair)
        both = session.report
        model(**lone)
        start = both.visual_tokens[0] - session.report.visual_tokens[0]
        # the cut in the decoder reads the prompt, and with it the neighbours
        for alone, beside in zip(session.report.kept, both.kept, strict=True):
            if alone.site.kind != "vision":
                continue
            mine = beside.indices[0][beside.indices[0] >= start] - start
            assert torch.equal(mine, alone.indices[0])


@torch.no_grad()
def test_beams_equal_masked_tower(case: Case) -> None:
    rows = ragged(case)
    if not case.beams_keep_order:
        rows = (rows[0], rows[2], Row(rows[0].media, 6, 2, 3))
    model, inputs = case.model(), case.batch(*rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    with vtprune.prune(model, "flowcut", 0.4) as session:
        out, report = model.generate(**inputs, **beams), session.report
    # beams repeat every sample; the tower runs on each picture once where the host encodes first
    blocks, lead = blocks_of(case)
    single = dataclasses.replace(
        report, kept=tuple(dataclasses.replace(k, indices=k.indices[::3]) for k in report.kept)
    )
    lost = gone(case, rows, single, blocks)
    if not HOST_ENCODES_FIRST:
        lost = gone(case, tuple(row for row in rows for _ in range(3)), report, blocks)
    wide = inputs["input_ids"].repeat_interleave(3, 0)
    hidden = hidden_keys(report, wide, LAYERS, case.visual(wide))
    with tower_masked(model, lost, lead), masked(model, hidden), renumbered(model, session.plan, hidden):
        assert torch.equal(out, model.generate(**inputs, **beams))


def test_gradients_equal_masked_tower(case: Case) -> None:
    rows = ragged(case)[:2]
    model, inputs = case.model(), case.batch(*rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    tower, modules = tower_of(model)
    last = next(p for n, p in modules[-1].named_parameters() if n.endswith("proj.weight"))
    weights = [next(tower.parameters()), last]

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), [w.grad.clone() for w in weights if w.grad is not None]

    with vtprune.prune(model, "flowcut", 0.4) as session:
        loss, got = step()
        report = session.report
    blocks, lead = blocks_of(case)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    lost = gone(case, rows, report, blocks)
    with tower_masked(model, lost, lead), masked(model, hidden), renumbered(model, session.plan, hidden):
        want, reference = step()
    torch.testing.assert_close(loss, want, **EXACT)
    assert len(got) == len(reference) > 0
    for mine, theirs in zip(got, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_remove_leaves_nothing_on_the_tower(case: Case) -> None:
    model, inputs = case.model(), case.batch(*ragged(case))
    base = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with vtprune.prune(model, "flowcut", 0.4):
        assert not torch.equal(model(**inputs).logits, base)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3"])
@torch.no_grad()
def test_a_spatial_rule_keeps_in_the_tower_what_it_keeps_behind_it(name: str) -> None:
    """Uniform reads rows and columns alone: also windows and merged patches must not move a token."""
    case = CASES[name]
    model, inputs = case.model(), case.batch(*one_picture_each(case))
    kept = []
    for site in (vtprune.Site("vision", 1), vtprune.Site("input")):
        with vtprune.prune(model, vtprune.Plan((vtprune.Stage(site, vtprune.Uniform(), 0.4),))) as session:
            model(**inputs)
            kept.append(session.report.kept[0].indices)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
