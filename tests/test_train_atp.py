"""Training ATP: soft masks in the model, the closed forms of its losses, and thresholds that learn."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from learned import ready
from models import LAYERS, Row, batch, llava
from oracle import hidden_keys, masked

import vtprune
from vtprune.errors import InputError, PlanError, UnsupportedModelError
from vtprune.predictors import Thresholds, load_predictor
from vtprune.scorers.atp import ATP
from vtprune.train.atp import AtpConfig, depth_loss, frozen, soft_tokens, train_atp
from vtprune.train.data import read_data
from vtprune.train.loop import LoopConfig
from vtprune.train.soft import soft_pruning

ROWS = (Row(1, 3, 5, 0), Row(2, 1, 6, 1), Row(1, 6, 7, 3))


@lru_cache
def tiny() -> tuple[Any, Any]:
    return vtprune.load_tiny("llava")


def thresholds(model: Any) -> tuple[ATP, Thresholds]:
    method = ready("atp", model)
    assert isinstance(method, ATP)
    return method, load_predictor(Thresholds, str(method.weights))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["single", "ragged"])
@torch.no_grad()
def test_soft_masks_that_are_steep_prune(rows: tuple[Row, ...], attention: str) -> None:
    """At a high temperature a soft mask is 0 or 1, and the run is the pruned one but for log(eps)."""
    model, inputs = llava(attention), batch(*rows)
    method, net = thresholds(model)
    with vtprune.prune(model, method) as session:
        pruned, report = model(**inputs).logits[:, -1], session.report
    with soft_pruning(model, method, net, temperature=1e6) as last:
        soft, call = model(**inputs, use_cache=False).logits[:, -1], last()
    torch.testing.assert_close(soft, pruned, atol=1e-3, rtol=1e-3)
    counts = torch.stack(call.counts(), 1).round().int().tolist()
    assert counts == [list(tokens[1:]) for tokens in report.tokens_per_layer]
    assert report.flops < report.flops_full
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        torch.testing.assert_close(soft, model(**inputs).logits[:, -1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_masks_of_modules_multiply_and_weaken_keys() -> None:
    model, inputs = llava("eager"), batch(ROWS[0])
    method, net = thresholds(model)
    seen: list[torch.Tensor] = []
    with soft_pruning(model, method, net) as last:
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
            )
        model(**inputs, use_cache=False)
        call = last()
    assert len(call.masks) == LAYERS - 1
    visual = (inputs["input_ids"][0] == 99).nonzero()[:, 0]
    product = torch.ones(len(visual))
    for layer, mask in enumerate(call.masks):
        product = product * (mask[0] + 1e-6)
        added = seen[layer + 1][0, 0, -1]
        torch.testing.assert_close(added[visual], product.log(), atol=1e-5, rtol=1e-5)
        assert not added[:3].any(), "text was weakened"
    assert all(0 < float(m) < 1 for m in call.masks[0][0])


def test_gradients_reach_the_thresholds_and_nothing_else() -> None:
    model, inputs = llava(), batch(*ROWS)
    method, net = thresholds(model)
    with frozen(model), soft_pruning(model, method, net):
        model(**inputs, use_cache=False).logits[:, -1].logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    base = model(**inputs).logits
    with soft_pruning(model, method, net):
        pass
    assert torch.equal(model(**inputs).logits, base)
    net.zero_grad()


def test_attention_without_masks_of_numbers_is_refused() -> None:
    model = llava()
    method, net = thresholds(model)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(UnsupportedModelError, match=r"sdpa or eager.*uses 'flash_attention_2'"),
        soft_pruning(model, method, net),
    ):
        pass


def test_closed_forms_of_the_losses() -> None:
    counts, total = [torch.tensor([n]) for n in (288.0, 144.0, 72.0)], torch.tensor([576.0])
    assert depth_loss(counts, (4, 14, 24), total).item() == 8.5
    modules = soft_tokens(counts, (4, 14, 24), total, 32, "modules").item()
    assert modules == 168.0
    # 5 layers see all, 10 see 288, 10 see 144 and 7 see 72
    layers = soft_tokens(counts, (4, 14, 24), total, 32, "layers").item()
    assert layers == (5 * 576 + 10 * 288 + 10 * 144 + 7 * 72) / 32
    assert 0.05 * 8.5 + 0.2 * abs(modules - 144) == pytest.approx(5.225)


def small(**changes: Any) -> AtpConfig:
    loop = LoopConfig(epochs=2, batch_size=8, lr=0.03, weight_decay=0.0, patience=None)
    return AtpConfig(**{"width": 4, "target": 0.3, "loop": loop, **changes})


@pytest.mark.slow
def test_training_from_scratch_comes_nearer_to_the_target(tmp_path: Path) -> None:
    model, processor = tiny()
    train, held_out = read_data("embedded", "train", 24), read_data("embedded", "held-out", 8)
    result = train_atp(model, processor, train, held_out, tmp_path, small(), dtype=torch.float16)
    first, best = result.history[0], result.history[result.best_epoch]
    assert best["held_out_loss"] < 0.8 * first["held_out_loss"]
    assert abs(best["held_out_tokens"] - 0.3) < abs(first["held_out_tokens"] - 0.3)
    weights = load_predictor(Thresholds, str(tmp_path))
    assert weights.after == (1, 5, 8)
    with vtprune.prune(model, ATP(weights=str(tmp_path))) as session:
        assert [str(stage.site) for stage in session.plan.stages] == ["layer[2]", "layer[6]", "layer[9]"]
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    model, processor = tiny()
    train, held_out = read_data("embedded", "train", 12), read_data("embedded", "held-out", 4)
    config = small(loop=LoopConfig(epochs=1, batch_size=4, lr=0.03, save_every=1))
    train_atp(model, processor, train, held_out, tmp_path / "whole", config)
    from vtprune.train import atp

    real, calls = atp.answer_losses, []

    def stops(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(atp, "answer_losses", stops)
    with pytest.raises(KeyboardInterrupt):
        train_atp(model, processor, train, held_out, tmp_path / "cut", config)
    train_atp(model, processor, train, held_out, tmp_path / "cut", config)
    one, other = (load_predictor(Thresholds, str(tmp_path / name)) for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len(calls) < 4 + 3 + 2, "it began again from the start"


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"target": 0.0}, InputError, "target must be a share"),
        ({"unit": "tokens"}, InputError, "unit must be 'layers' or 'modules'"),
        ({"lambda_atp": -1.0}, InputError, "lambda_atp and lambda_target must be >= 0"),
        ({"temperature": 0.0}, InputError, "temperature above 0"),
        ({"width": 0}, InputError, "width must be an int >= 1"),
        ({"axis": "both"}, PlanError, "axis must be"),
    ],
)
def test_settings_are_checked(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtpConfig(**knobs)
