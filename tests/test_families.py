"""DESIGN invariants for every family beside LLaVA, on tiny random models of the real classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import CASES, LAYERS, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor

import vtprune

NAMES = sorted(CASES)
METHODS = [("uniform", 0.4), ("fastv", 0.5), ("random", 7)]
IDS = ["uniform", "fastv", "random-7"]
GREEDY = {"max_new_tokens": 16, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def one(case: Case, seed: int = 0) -> tuple[Row, ...]:
    return (Row((("image", case.sizes[0]),), seed=seed),)


def ragged(case: Case) -> tuple[Row, ...]:
    """Another size in every prompt, two images in one, none in another."""
    first, second, third = case.sizes
    return (
        Row((("image", first),), 3, 5, 0),
        Row((("image", second), ("image", third)), 1, 4, 1),
        Row((), 2, 9, 2),
        Row((("image", third),), 6, 2, 3),
    )


def cache_tensors(output: Any) -> list[Tensor]:
    return [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_keep_all_is_bit_identical(case: Case, attention: str) -> None:
    model, inputs = case.model(attention), case.batch(*ragged(case))
    base, ids = model(**inputs), model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with vtprune.prune(model, "fastv", keep=1.0) as session:
        out, got = model(**inputs), model.generate(**inputs, max_new_tokens=6, do_sample=False)
        report = session.report
    assert torch.equal(base.logits, out.logits)
    assert torch.equal(ids, got)
    assert all(torch.equal(a, b) for a, b in zip(cache_tensors(base), cache_tensors(out), strict=True))
    assert report.visual_tokens == tuple(case.visual(inputs["input_ids"]).sum(1).tolist())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "keep"), METHODS, ids=IDS)
@pytest.mark.parametrize("rows", [one, ragged])
@torch.no_grad()
def test_pruned_run_equals_masked_oracle(case: Case, rows: Any, method: str, keep: Any, attention: str) -> None:
    model, inputs = case.model(attention), case.batch(*rows(case))
    with vtprune.prune(model, method, keep) as session:
        logits = model(**inputs).logits
        out = model.generate(**inputs, **GREEDY)
        report = session.report
    visual = case.visual(inputs["input_ids"])
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, visual)
    with masked(model, hidden):
        want = model(**inputs).logits
        ref = model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    for got, wanted in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)

    wrong = [torch.roll(h, 1, dims=1) & visual for h in hidden]
    with masked(model, wrong):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-3, "the oracle must notice when other tokens are hidden"


@pytest.mark.parametrize(
    ("method", "keep"), [*METHODS, ("pool", 0.3), ("divprune", 0.3)], ids=[*IDS, "pool", "divprune"]
)
@torch.no_grad()
def test_batch_equals_each_sample_alone(case: Case, method: str, keep: Any) -> None:
    model, rows = case.model(), ragged(case)
    inputs = case.batch(*rows)
    width = inputs["input_ids"].shape[1]
    with vtprune.prune(model, method, keep) as session:
        together = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        kept = session.report.kept
        for b, row in enumerate(rows):
            alone = case.batch(row)
            ids = model.generate(**alone, max_new_tokens=8, do_sample=False)
            assert torch.equal(ids[0, alone["input_ids"].shape[1] :], together[b, width:])
            if row.media:
                for mine, all_rows in zip(session.report.kept, kept, strict=True):
                    assert torch.equal(mine.indices[0], all_rows.indices[b])


@pytest.mark.parametrize("method", ["uniform", "fastv"])
@torch.no_grad()
def test_beams_equal_masked_oracle(case: Case, method: str) -> None:
    model, inputs = case.model(), case.batch(*ragged(case))
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    with vtprune.prune(model, method, 0.5) as session:
        out = model.generate(**inputs, **beams)
        report = session.report
    wide = inputs["input_ids"].repeat_interleave(3, 0)
    with masked(model, hidden_keys(report, wide, LAYERS, case.visual(wide))):
        assert torch.equal(out, model.generate(**inputs, **beams))


@pytest.mark.parametrize("method", ["uniform", "fastv"])
@torch.no_grad()
def test_videos_equal_masked_oracle(case: Case, method: str) -> None:
    if not case.videos:
        pytest.skip(f"{case.name} takes no videos of their own kind")
    rows = (
        Row((("video", case.videos[0]),), 3, 5, 0),
        Row((("image", case.sizes[0]),), 1, 3, 4),
    )
    model, inputs = case.model(), case.batch(*rows)
    with vtprune.prune(model, method, 0.5) as session:
        logits, out = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        report = session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)


@torch.no_grad()
def test_remove_leaves_nothing(case: Case) -> None:
    model, inputs = case.model(), case.batch(*one(case))
    base = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    with vtprune.prune(model, "fastv", 0.5):
        assert not torch.equal(model(**inputs).logits, base)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert torch.equal(model(**inputs).logits, base)


def test_gradients_flow_and_equal_the_oracle(case: Case) -> None:
    model, inputs = case.model(), case.batch(*one(case))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtprune.prune(model, "fastv", 0.5) as session:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        report = session.report
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    got = model.get_parameter(weight).grad.clone()
    model.zero_grad()
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs, labels=labels, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(got, model.get_parameter(weight).grad, atol=1e-4, rtol=1e-4)
