"""Models whose layers lie on several devices (`device_map`), with a second device that needs no hardware."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from family_models import CASES, Case, Row
from torch import nn
from tower_cases import NAMES as OPENED
from tower_cases import ragged
from tower_oracle import tower_of
from two_devices import Elsewhere, second_device

import vtprune

accelerate = pytest.importorskip("accelerate")

GREEDY = {"max_new_tokens": 5, "do_sample": False}
# a parameter of the root itself has to be named, and is then said to be no module
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")


def device_map(
    module: nn.Module, there: Collection[nn.Module], device: Any, name: str = ""
) -> Iterator[tuple[str, Any]]:
    """(name, device) of every part, those of `there` on `device`, as coarse as can be."""
    if module in there:
        yield name, device
    elif not any(part in there for part in module.modules()):
        yield name, "cpu"
    else:
        dot = f"{name}." if name else ""
        yield from ((dot + own, "cpu") for own, _ in module.named_parameters(recurse=False))
        for child, part in module.named_children():
            yield from device_map(part, there, device, dot + child)


def few(names: Collection[str]) -> list[Any]:
    """All of them, those that differ little from the others only with `-m slow`."""
    fast = ("llava", "qwen2_vl", "gemma3", "idefics2")
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


def layers_of(model: Any) -> list[nn.Module]:
    """Decoder layers."""
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    return list(text.layers)


def blocks_of(model: Any) -> list[nn.Module]:
    """Blocks of the tower of images."""
    attention = tower_of(model)[1]
    return [module for module in model.modules() if any(child in attention for child in module.children())]


def spread(model: Any, there: Collection[nn.Module], device: torch.device) -> None:
    """Dispatch a model; `there` goes to `device`."""
    accelerate.dispatch_model(model, dict(device_map(model, there, device)), main_device="cpu")
    assert there
    assert all(isinstance(next(part.parameters()), Elsewhere) for part in there)


def cuts(case: Case) -> vtprune.Plan:
    """A cut at every kind of site; that at layer 2 reads the attention of layer 1."""
    stages = [
        vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 0.7),
        vtprune.Stage(vtprune.Site("layer", 2), vtprune.FastV(layer=2), 0.5),
        vtprune.Stage(vtprune.Site("layer", 3), vtprune.DivPrune(), 0.3),
    ]
    if case.name in OPENED:
        stages.insert(0, vtprune.Stage(vtprune.Site("vision", 1), vtprune.Random(), 0.8))
    return vtprune.Plan(tuple(stages))


@pytest.mark.parametrize("on", [(1, 2, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("name", few(CASES))
@torch.no_grad()
def test_layers_on_two_devices_give_the_same_answer(name: str, on: tuple[int, ...]) -> None:
    if name == "aria":
        pytest.skip("the host counts tokens of experts in another way on devices that are no CPU")
    case = CASES[name]
    plain, model, inputs = case.model(), case.model(), case.batch(*ragged(case))
    with vtprune.prune(plain, cuts(case)) as session:
        want, logits, kept = plain.generate(**inputs, **GREEDY), plain(**inputs).logits, session.report.kept
    with second_device() as device:
        spread(model, [layers_of(model)[i] for i in on], device)
        with vtprune.prune(model, cuts(case)) as session:
            assert torch.equal(model.generate(**inputs, **GREEDY), want)
            # the second device runs another attention kernel
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
            for mine, theirs in zip(session.report.kept, kept, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine.indices, theirs.indices, strict=True))


@pytest.mark.parametrize("on", [(1, 2, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("name", few(OPENED))
@torch.no_grad()
def test_tower_blocks_on_two_devices_give_the_same_answer(name: str, on: tuple[int, ...]) -> None:
    case = CASES[name]
    plain, model, inputs = case.model(), case.model(), case.batch(*ragged(case))
    with vtprune.prune(plain, "flowcut", 0.4) as session:
        want, logits, kept = plain.generate(**inputs, **GREEDY), plain(**inputs).logits, session.report.kept
    with second_device() as device:
        spread(model, [blocks_of(model)[i] for i in on], device)
        with vtprune.prune(model, "flowcut", 0.4) as session:
            assert torch.equal(model.generate(**inputs, **GREEDY), want)
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
            for mine, theirs in zip(session.report.kept, kept, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine.indices, theirs.indices, strict=True))


@pytest.mark.parametrize("method", ["pool", vtprune.FastV(layer=2, positions="compact")], ids=["pool", "compact"])
@torch.no_grad()
def test_turns_beams_merges_and_closed_positions_on_two_devices(method: Any) -> None:
    case = CASES["llava"]
    plain, model = case.model(), case.model()
    first = case.batch(Row((("image", None),)), Row((("image", None), ("image", None)), 1, 4, 1))
    how = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}

    def talk(model: Any) -> list[torch.Tensor]:
        beams = model.generate(**first, **how).sequences
        said = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([said.sequences, torch.tensor([[11, 12, 13], [14, 15, 16]])], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - first["input_ids"].shape[1])], 1).long()
        again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=said.past_key_values, **GREEDY)
        return [beams, said.sequences, again]

    with vtprune.prune(plain, method, 0.5):
        want = talk(plain)
    with second_device() as device:
        spread(model, [layers_of(model)[i] for i in (1, 3)], device)
        with vtprune.prune(model, method, 0.5):
            for mine, theirs in zip(talk(model), want, strict=True):
                assert torch.equal(mine, theirs)
