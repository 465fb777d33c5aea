"""Training DyVTE's gates: labels against an oracle, features as inference reads them, and a fit that learns."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES
from family_models import Row as FamilyRow
from models import LAYERS, Row, batch, llava
from oracle import hidden_keys, masked
from torch.nn import functional

import vtprune
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.predictors import ExitGates, Fingerprint, load_predictor
from vtprune.scorers.dyvte import DyVTE
from vtprune.train.causal import require_causal
from vtprune.train.data import read_data
from vtprune.train.dyvte import (
    DyvteConfig,
    answer_losses,
    exit_labels,
    exit_outcomes,
    gate_features,
    train_dyvte,
)
from vtprune.train.encoding import Encoded, encode
from vtprune.train.loop import LoopConfig
from vtprune.train.replay import Replay

ROWS = (Row(1, 3, 5, 0), Row(2, 1, 6, 1), Row(1, 6, 7, 3))


def asked(*rows: Row, answer: int = 3) -> Encoded:
    """Prompts whose last tokens are the answer."""
    inputs = batch(*rows)
    width = inputs["input_ids"].shape[1]
    return Encoded(inputs, (torch.arange(width) >= width - answer).expand(len(rows), -1))


@lru_cache
def tiny() -> tuple[Any, Any]:
    return vtprune.load_tiny("llava")


def test_losses_are_those_of_the_answers_tokens() -> None:
    model, data = llava(), asked(*ROWS)
    with torch.no_grad():
        logits = model(**data.inputs).logits
    losses, words = answer_losses(logits, data)
    for b, row in enumerate(data.inputs["input_ids"]):
        want = functional.cross_entropy(logits[b, -4:-1], row[-3:])
        torch.testing.assert_close(losses[b], want)
        assert torch.equal(words[b], logits[b, -4:-1].argmax(1))
    with pytest.raises(InputError, match="encoded without answers"):
        answer_losses(logits, Encoded(data.inputs, None))


@torch.no_grad()
def test_outcomes_equal_the_model_with_all_visual_tokens_hidden() -> None:
    model, data = llava(), asked(*ROWS)
    found = exit_outcomes(model, data, range(LAYERS - 1))
    full, wanted = answer_losses(model(**data.inputs).logits, data)
    torch.testing.assert_close(found["full"], full)
    for layer in range(LAYERS - 1):
        with vtprune.prune(model, DyVTE(exit_layer=layer)) as session:
            model(**data.inputs)
            hidden = hidden_keys(session.report, data.inputs["input_ids"], LAYERS)
        with masked(model, hidden):
            loss, words = answer_losses(model(**data.inputs).logits, data)
        torch.testing.assert_close(found["loss"][:, layer], loss, atol=1e-5, rtol=1e-5)
        agree = torch.tensor([(a == b).float().mean() for a, b in zip(words, wanted, strict=True)])
        assert torch.equal(found["agree"][:, layer], agree)
    assert len(found["loss"].unique()) == found["loss"].numel()


def test_labels_ask_for_the_same_words_and_a_loss_that_is_not_much_larger() -> None:
    outcomes = {
        "agree": torch.tensor([[1.0, 1.0, 0.99, 1.0, 0.5]]),
        "loss": torch.tensor([[1.02, 1.04, 1.0, 0.2, 0.2]]),
        "full": torch.tensor([1.0]),
    }
    assert exit_labels(outcomes, DyvteConfig()).tolist() == [[True, False, False, True, False]]
    assert exit_labels(outcomes, DyvteConfig(slack=0.05)).tolist() == [[True, True, False, True, False]]
    assert exit_labels(outcomes, DyvteConfig(ratio=1.0)).tolist() == [[False, False, False, True, False]]
    assert exit_labels(outcomes, DyvteConfig(agree=0.4)).tolist() == [[True, False, True, True, True]]


@torch.no_grad()
def test_a_model_whose_prompt_sees_the_answer_is_refused() -> None:
    for name in ("llava", "qwen2_vl", "paligemma"):
        case = CASES[name]
        inputs = case.batch(FamilyRow((("image", case.sizes[0]),), 3, 5, 0))
        width = inputs["input_ids"].shape[1]
        data = Encoded(inputs, (torch.arange(width) >= width - 2)[None])
        if name != "paligemma":
            require_causal(case.model(), data)
            continue
        with pytest.raises(UnsupportedModelError, match="see the answer that is forced behind the prompt"):
            require_causal(case.model(), data)


@torch.no_grad()
def test_replayed_calls_are_the_calls_and_leave_nothing() -> None:
    model, data = llava(), asked(*ROWS)
    model(**data.inputs)  # transformers adds hooks of its own at the first call
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    calls: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(lambda *given: calls.append(1))
    with Replay(model) as replay:
        with replay.recording():
            full = model(**data.inputs).logits
        for layer in range(LAYERS - 1):
            with vtprune.prune(model, DyVTE(exit_layer=layer)):
                want = model(**data.inputs).logits
                with replay.from_layer(layer):
                    assert torch.equal(model(**data.inputs).logits[data.answer], want[data.answer])
    assert len(calls) == 1, "the tower ran more than once"
    handle.remove()
    assert torch.equal(model(**data.inputs).logits, full)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()


@torch.no_grad()
def test_gates_learn_from_what_they_will_read() -> None:
    """The answer behind the prompt changes no feature, and a run of the gates reads the very same ones."""
    model, processor = tiny()
    examples = read_data("embedded", "held-out", 4)
    prompts = encode(processor, examples, "cpu", answers=False)
    features = gate_features(model, prompts)
    assert features.shape == (4, 11, 320)
    seen: list[torch.Tensor] = []

    class Watching(DyVTE):
        @property
        def needs_weights(self) -> bool:
            return False

        def count(self, view: Any) -> torch.Tensor:
            seen.append(self.features(view))
            return view.valid.sum(1)

    with vtprune.prune(model, Watching()):
        model.generate(**prompts.inputs, max_new_tokens=3, do_sample=False)
    # with a cache the host takes another path, so the bits differ
    torch.testing.assert_close(torch.stack(seen, 1), features, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(gate_features(model, prompts, "all"), features)


def small(**changes: Any) -> DyvteConfig:
    loop = LoopConfig(epochs=30, batch_size=16, lr=3e-3, weight_decay=0.0, patience=None)
    return DyvteConfig(**{"width": 4, "layers_per_example": None, "slack": 0.02, "loop": loop, **changes})


@pytest.mark.slow
def test_training_from_scratch_beats_an_untrained_gate(tmp_path: Path) -> None:
    model, processor = tiny()
    train, held_out = read_data("embedded", "train", 48), read_data("embedded", "held-out", 32)
    result = train_dyvte(model, processor, train, held_out, tmp_path, small(), dtype=torch.float16)
    first, best = result.history[0], result.history[result.best_epoch]
    assert best["held_out_loss"] < 0.8 * first["held_out_loss"]
    # better than the more frequent answer, too
    often = max(best["held_out_leave"], 1 - best["held_out_leave"])
    assert best["held_out_accuracy"] > often + 0.03
    gates = load_predictor(ExitGates, str(tmp_path))
    assert gates.fingerprint == Fingerprint.of(model)
    with vtprune.prune(model, DyVTE(weights=str(tmp_path))) as session, torch.no_grad():
        model(**encode(processor, held_out, "cpu", answers=False).inputs)
    assert 0 < session.report.flops < session.report.flops_full
    assert len(set(session.report.average_tokens)) > 1, "all samples left behind the same layer"


def test_labels_are_computed_once_whatever_is_fitted_to_them(tmp_path: Path, monkeypatch: Any) -> None:
    model, processor = tiny()
    train, held_out = read_data("embedded", "train", 8), read_data("embedded", "held-out", 4)
    loop = LoopConfig(epochs=1, batch_size=8, weight_decay=0.0)
    config = small(layers_per_example=2, label_batch=4, loop=loop)
    train_dyvte(model, processor, train, held_out, tmp_path, config)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "labels").iterdir()}
    assert len(shards) == 3
    monkeypatch.setattr("vtprune.train.dyvte.exit_outcomes", None)
    again = tmp_path / "run" / "state.safetensors"
    again.unlink()
    changed = small(layers_per_example=2, label_batch=4, loop=loop, slack=0.5, stay_weight=2.0, ratio=1.5, agree=0.5)
    train_dyvte(model, processor, train, held_out, tmp_path, changed)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "labels").iterdir()} == shards


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"width": 0}, "width must be an int >= 1"),
        ({"label_batch": 1.5}, "label_batch must be an int >= 1"),
        ({"layers_per_example": 0}, "layers_per_example must be an int >= 1, or None"),
        ({"agree": 1.0}, r"agree must be in \[0, 1\)"),
        ({"ratio": 0.0}, "ratio and stay_weight above 0"),
        ({"slack": -1.0}, "slack >= 0"),
        ({"stay_weight": 0.0}, "ratio and stay_weight above 0"),
    ],
)
def test_settings_are_checked(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DyvteConfig(**knobs)
