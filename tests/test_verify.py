"""vtprune.verify(): the masked oracle on the user's own model and prompt; and the time that scorers take."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from family_models import CASES, Row

import vtprune
from vtprune import FastV, GemFilter, TransPrune
from vtprune.stopwatch import scoring, scoring_time

METHODS = [
    ("uniform", 0.5),
    ("flowcut", 0.5),
    ("pool", 0.5),
    (FastV(positions="compact"), 0.5),
    (GemFilter(layer=1, tokens="any"), 0.6),
    (TransPrune(layers=(1, 2, 3)), 0.7),
    (["uniform", "fastv"], [0.7, 0.5]),
]


def prompt(name: str) -> dict[str, Any]:
    case = CASES[name]
    return case.batch(Row((("image", case.sizes[0]),), 3, 5, 0), Row((("image", case.sizes[1]),), 4, 9, 1))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "llava_next"])
@pytest.mark.parametrize(("method", "keep"), METHODS, ids=lambda value: str(value)[:30])
def test_pruning_is_hiding(name: str, method: Any, keep: Any) -> None:
    model = CASES[name].model()
    if name == "qwen2_vl" and getattr(method, "positions", "keep") == "compact":
        pytest.skip("no compact positions under M-RoPE")
    result = vtprune.verify(model, prompt(name), method, keep)
    assert result.exact
    assert result.error < 1e-5
    assert result.told_apart or result.control == 0.0  # the mirror image of a symmetric choice is the choice itself
    assert result.report.kept
    with vtprune.prune(model, "uniform", 0.5):
        pass  # nothing is attached any more


@pytest.mark.parametrize("where", [0, 2])
def test_a_model_that_mixes_rows_behind_the_mask_is_found_out(where: int) -> None:
    """A layer that adds the mean of all rows depends on tokens that attention hides."""
    model, inputs = CASES["llava"].model(), prompt("llava")
    layer = model.model.language_model.layers[where]
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(1, keepdim=True))
    result = vtprune.verify(model, inputs, "fastv", 0.6)
    # the cut lies in front of layer 1: what layer 0 does to all tokens is no fault of pruning
    assert result.exact == (where == 0)


@pytest.mark.parametrize("name", ["uniform", "flowcut"])
def test_embeddings_that_are_lost_are_found_out(name: str) -> None:
    """The unpruned run starts from the embeddings of the pruned one, so only what follows is compared."""
    model, inputs = CASES["llava"].model(), prompt("llava")
    assert vtprune.verify(model, inputs, name, 0.5).exact
    norm = model.model.language_model.norm
    norm.register_forward_hook(lambda module, args, output: output + (output.shape[1] == inputs["input_ids"].shape[1]))
    assert not vtprune.verify(model, inputs, name, 0.5).exact


def test_keep_all_and_what_cannot_be_verified() -> None:
    model = CASES["llava"].model()
    whole = vtprune.verify(model, prompt("llava"), "uniform", 1.0)
    assert (whole.error, whole.control, whole.exact, whole.told_apart) == (0.0, 0.0, True, False)
    text = CASES["llava"].batch(Row((), 2, 9, 2))
    with pytest.raises(vtprune.InputError, match="needs a prompt with an image"):
        vtprune.verify(model, text, "uniform", 0.5)
    with pytest.raises(vtprune.UnsupportedModelError, match="sliding windows"):
        vtprune.verify(CASES["gemma3"].model(), prompt("gemma3"), "uniform", 0.5)
    with pytest.raises(vtprune.UnsupportedModelError, match="adds visual features of its tower"):
        vtprune.verify(CASES["qwen3_vl"].model(), prompt("qwen3_vl"), "flowcut", 0.5)
    assert vtprune.verify(CASES["qwen3_vl"].model(), prompt("qwen3_vl"), "fastv", 0.6).exact


def test_half_precision_has_a_wider_bound() -> None:
    model = CASES["llava"].model().to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in prompt("llava").items()}
    result = vtprune.verify(model, inputs, "fastv", 0.5)
    assert (result.allowed, result.contrast) == (0.1, 3.0)
    assert result.exact
    assert result.told_apart


# the time of scorers


@torch.no_grad()
def test_time_of_scorers_is_added_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    with scoring_time() as outer, scoring_time() as inner:
        with scoring(), scoring():
            pass
        with pytest.raises(ZeroDivisionError), scoring():
            raise ZeroDivisionError
    assert outer.seconds == inner.seconds == 2.0
    with scoring():
        pass
    assert outer.seconds == 2.0
    model, inputs = CASES["llava"].model(), prompt("llava")
    counts = {}
    for name, method, keep in (
        ("uniform", "uniform", 0.5),
        ("fastv", FastV(), 0.5),
        ("flowcut", "flowcut", 0.5),
        ("transprune", TransPrune(layers=(1, 2, 3)), 0.7),
        ("nothing", "fastv", 1.0),
    ):
        with vtprune.prune(model, method, keep), scoring_time() as watch:
            model(**inputs)
        counts[name] = watch.seconds
    # a cut; an attention read and a cut; tower blocks read and a cut; two sublayers of three layers, 3 reads, 3 cuts
    assert counts["uniform"] == 1
    assert counts["fastv"] == 2
    assert counts["flowcut"] > 2
    assert counts["transprune"] == 2 * 3 + 3 + 3
    assert counts["nothing"] == 0
