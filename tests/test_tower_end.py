"""Methods that choose among finished features: FasterVLM, VisPruner, VisionZip, SCOPE; CDPruner with its question."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from family_models import CASES
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked
from scorer_views import HEADS, LLAVA, Sample, attention_view, token_view
from test_selections import covering, greedy_determinant, paired
from test_tower import BLOCKS
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import PlanError, UnsupportedModelError
from vtprune.plan import Site
from vtprune.scorers import tower_end
from vtprune.scorers.tower_end import received_attention

ROWS = (Row(1, 3, 5, 0), Row(0, 2, 9, 2), Row(2, 1, 4, 1))
LAST = 5
METHODS = ("fastervlm", "vispruner", "visionzip", "scope")


def tower_of(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block that is read, with CLS: weights [images, H, N, N], keys [images, N, H, d], features [images, N, W]."""
    tower, seen = model.model.vision_tower, {}
    block = tower.encoder.layers[LAST]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen["query"], seen["key"] = (
            p(hidden).unflatten(-1, (module.num_heads, -1)) for p in (module.q_proj, module.k_proj)
        )

    handles = [
        block.self_attn.register_forward_pre_hook(look, with_kwargs=True),
        block.register_forward_hook(lambda m, a, out: seen.update(features=out)),
    ]
    model.get_image_features(pixels)
    for handle in handles:
        handle.remove()
    query, key = seen["query"], seen["key"]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return logits.softmax(-1), key, seen["features"]


def attention_of(weights: Tensor, has_cls: bool) -> Tensor:
    """[images, TOKENS] what CLS attends to, or what a patch receives from all."""
    return weights[:, :, 0, 1:].mean(1) if has_cls else weights.mean((1, 2))


def kept_of(report: Any) -> list[list[int]]:
    """The patches of each image."""
    rows = []
    for b, row in enumerate(ROWS):
        mine = report.kept[0].indices[b]
        rows += [(mine[(mine // TOKENS) == i] - i * TOKENS).tolist() for i in range(row.images)]
    return rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_it_keeps_what_the_formula_says(method: str, tower: str) -> None:
    model, inputs = llava("sdpa", tower), batch(*ROWS)
    assert vtprune.geometry(model).vision.feature_block == LAST < BLOCKS
    weights, keys, features = tower_of(model, inputs["pixel_values"])
    lead = int(tower == "clip")
    attention, keys, features = attention_of(weights, bool(lead)), keys[:, lead:].mean(2), features[:, lead:]
    with vtprune.prune(model, method, 0.375) as session:  # 6 of 16
        logits, report = model(**inputs).logits, session.report
        model.generate(**inputs, max_new_tokens=2)
        assert kept_of(session.report) == kept_of(report)
    assert [str(r.site) for r in report.kept] == [f"vision[{LAST}]"]
    wanted, merged = [], features.clone()
    for image in range(3):
        order = attention[image].argsort(descending=True).tolist()
        if method == "fastervlm":
            wanted.append(sorted(order[:6]))
        elif method == "vispruner":
            wanted.append(paired(features[image], attention[image], 6, 0.5, 8))
        elif method == "scope":
            wanted.append(sorted(covering(features[image], attention[image], 6)))
        else:
            # round(6 * 10 / 64) = 1 target, the first of the rest, which takes in all others
            rest = sorted(order[5:])
            wanted.append(sorted([*order[:5], rest[0]]))
            merged[image, rest[0]] += features[image, rest[1:]].mean(0)
    assert kept_of(report) == wanted
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden, model.model.multi_modal_projector(merged)):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_contextual_tokens_gather_by_keys() -> None:
    model, inputs = llava("sdpa", "clip"), batch(*ROWS)
    weights, keys, _ = tower_of(model, inputs["pixel_values"])
    attention, keys = attention_of(weights, True), keys[:, 1:].mean(2)
    with vtprune.prune(model, vtprune.VisionZip(contextual=0.5), 0.375) as session:
        model(**inputs)
        report = session.report
    unit = keys / keys.norm(dim=-1, keepdim=True)
    owners = [report.owners(b) for b in (0, 2)]
    owners = [owners[0], *(owners[1][i * TOKENS : (i + 1) * TOKENS] - i * TOKENS for i in range(2))]
    for image in range(3):
        order = attention[image].argsort(descending=True).tolist()
        rest = sorted(order[3:])
        targets = rest[:: len(rest) // 3][:3]
        for token in rest:
            best = max(targets, key=lambda t: float(unit[image, token] @ unit[image, t]))
            assert owners[image][token] == (token if token in targets else best)


def test_received_attention_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = (Sample(((3, 4),), seed=1), Sample(((2, 2),), seed=2), Sample(((1, 1),), seed=3))
    view = attention_view(samples, has_cls=True)
    every = torch.randn(3, HEADS, view.key.shape[2], view.key.shape[3], generator=torch.Generator().manual_seed(0))
    view = dataclasses.replace(
        view, has_cls=False, every_query=every.masked_fill(~view.real[:, None, :, None], math.nan)
    )
    got = received_attention(view)
    for b in range(3):
        here = view.real[b].nonzero()[:, 0]
        key = view.key[b][:, here].repeat_interleave(2, 0)
        weights = (every[b][:, here] @ key.transpose(1, 2) * view.scaling).softmax(-1).mean((0, 1))
        want = torch.zeros(view.key.shape[2]).scatter(0, here, weights)[view.column[b]]
        torch.testing.assert_close(got[b][view.valid[b]], want[view.valid[b]])
    monkeypatch.setattr(tower_end, "_BLOCK", 1)
    torch.testing.assert_close(received_attention(view)[view.valid], got[view.valid])


@pytest.mark.parametrize("method", [*METHODS, "hiprune"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_next"])
@torch.no_grad()
def test_merged_cells_and_crops_know_no_batch_mates(method: str, name: str) -> None:
    case = CASES[name]
    first, second, third = case.tower_sizes or case.sizes
    from family_models import Row as Media

    rows = (Media((("image", first),), 3, 5, 0), Media((("image", second), ("image", third)), 1, 4, 1))
    model = case.model()
    with vtprune.prune(model, method, 0.4) as session:
        together, kept = model(**case.batch(*rows)).logits, session.report.kept[0]
        for b, row in enumerate(rows):
            alone = model(**case.batch(row)).logits[0]
            torch.testing.assert_close(together[b, -1], alone[-1], atol=1e-5, rtol=1e-5)
            assert torch.equal(kept.indices[b], session.report.kept[0].indices[0])
            # each of up to five crops rounds by itself
            assert abs(len(kept.indices[b]) - 0.4 * session.report.visual_tokens[0]) <= 2.5


@pytest.mark.parametrize("method", [*METHODS, "hiprune"])
def test_budgets(method: str) -> None:
    scorer = vtprune.contract.METHODS[method]()
    for keep in (64, 0.25, 1.0):
        (stage,) = scorer.plan(LLAVA, Budget.make(keep)).stages
        assert (stage.site, stage.keep, type(stage.keep)) == (Site("vision", 22), keep, type(keep))
    (stage,) = scorer.plan(LLAVA, Budget.make(flops=0.5)).stages
    assert isinstance(stage.keep, float)
    blind = dataclasses.replace(LLAVA, vision=None)
    with pytest.raises(UnsupportedModelError, match=f"{method} chooses among the features of the vision tower"):
        scorer.plan(blind, Budget.make(64))


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("VisPruner", {"important": 2}, r"important must be a number in \[0, 1\], got 2"),
        ("VisionZip", {"contextual": 1}, r"share must be a number in \[0, 1\), got 1"),
        ("SCOPE", {"alpha": -1}, "coverage alpha must be a number >= 0, got -1"),
        ("CDPruner", {"theta": 1.0}, r"theta must be a number in \[0, 1\) or None, got 1.0"),
    ],
)
def test_knobs(name: str, knobs: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        getattr(vtprune, name)(**knobs)


# CDPruner


@torch.no_grad()
def test_cdpruner_equals_determinants_of_what_the_question_asks() -> None:
    model, rows = llava(), (Row(1, 3, 5, 0), Row(1, 1, 4, 1))
    inputs = batch(*rows)
    with vtprune.prune(model, "cdpruner", 5) as session:
        model(**inputs)
        report = session.report
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    table = model.get_input_embeddings().weight
    for b in range(len(rows)):
        ids = inputs["input_ids"][b]
        words = table[ids[int((ids == IMAGE).nonzero().max()) + 1 :]]
        unit = features[b] / features[b].norm(dim=1, keepdim=True)
        relevance = (unit @ (words / words.norm(dim=1, keepdim=True)).T).mean(1)
        quality = (relevance - relevance.min()) / (relevance.max() - relevance.min())
        want = greedy_determinant(features[b], quality.clamp(min=1e-6), 5)
        assert report.kept[0].indices[b].tolist() == want


def test_cdpruner_asks_only_what_stands_behind_the_image() -> None:
    view = token_view([Sample(((4, 4),), seed=1, text=6)], [5])
    scorer = vtprune.CDPruner()
    text = view.text
    other = dataclasses.replace(text, hidden=text.hidden.where(text.behind[..., None], 7.0))
    assert torch.equal(scorer.score(dataclasses.replace(view, text=other)), scorer.score(view))
    other = dataclasses.replace(text, hidden=text.hidden.where(~text.behind[..., None], 7.0))
    assert not torch.equal(scorer.score(dataclasses.replace(view, text=other)), scorer.score(view))
    # no instruction: diversity alone
    silent = dataclasses.replace(view, text=dataclasses.replace(text, behind=torch.zeros_like(text.behind)))
    assert not scorer.score(silent).any()
    assert torch.equal(scorer.select(silent), vtprune.DPP().select(view, None))
    with pytest.raises(PlanError, match="cdpruner reads the prompt's text"):
        scorer.score(dataclasses.replace(view, text=None))
