"""DyVTE: its gates, where they let tokens leave, and that a run with exits is the unpruned one with tokens hidden."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES
from family_models import Row as FamilyRow
from learned import ready, weights
from models import LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, same_scores

import vtprune
from vtprune.budget import Budget
from vtprune.errors import BudgetError, CheckpointError, InputError, PlanError, ShapeError, UntrainedError
from vtprune.hooks.prefill import Prefill
from vtprune.predictors import ExitGates, Fingerprint
from vtprune.scorers.dyvte import DyVTE, exit_features

RAGGED = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2), Row(1, 6, 2, 3))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
NOBODY = Fingerprint("nobody", 3, 3).to_dict()


def wave(rows: int, columns: int, a: float, b: float, c: float = 0.0) -> torch.Tensor:
    """sin(a r + b j + c), the input generator of the golden numbers."""
    r, j = torch.arange(rows).double()[:, None], torch.arange(columns).double()[None]
    return torch.sin(a * r + b * j + c).float()


def gates_for(model: Any, folder: Path, biases: list[float]) -> DyVTE:
    """Gates that each look in one direction of the last token, times their bias."""
    shape = Fingerprint.of(model)
    gates = ExitGates(shape.to_dict(), shape.layers, shape.hidden, width=2)
    for down, up, bias in zip(gates.down, gates.up, biases, strict=True):
        down.weight.data.zero_()
        down.weight.data[0, shape.hidden :] = wave(1, shape.hidden, 0.0, 1.7, 0.3)[0]
        up.weight.data.copy_(torch.tensor([[0.0, 0.0], [bias, 0.0]]))
    gates.save_pretrained(folder)
    return DyVTE(weights=str(folder))


# the gate


def test_golden_gate() -> None:
    gates = ExitGates(NOBODY, layers=3, hidden=3, width=2048)
    gates.down[1].weight.data = 0.1 * wave(2048, 6, 0.01, 0.7, 0.1)
    gates.up[1].weight.data = 0.05 * wave(2, 2048, 0.5, 0.013, 0.2)
    logits = gates(1, wave(1, 6, 0.0, 0.9, 0.3))
    torch.testing.assert_close(logits, torch.tensor([[0.29354376, 0.38040188]]), rtol=1e-5, atol=0)


def test_size_is_the_papers_but_for_the_last_layer() -> None:
    with torch.device("meta"):
        gates = ExitGates({**NOBODY}, layers=32, hidden=4096)
        small = ExitGates({**NOBODY}, layers=32, hidden=4096, width=16)
    published = 32 * (8192 * 2048 + 4096)
    assert sum(p.numel() for p in gates.parameters()) == published * 31 // 32
    assert sum(p.numel() for p in small.parameters()) * 100 < published
    with pytest.raises(ShapeError, match="layers >= 2, hidden and width >= 1, got 1, 8 and 4"):
        ExitGates(NOBODY, 1, 8, 4)


def test_features_are_the_mean_of_the_text_and_its_last_token() -> None:
    text = torch.arange(2 * 4 * 2).float().reshape(2, 4, 2)
    text[1, 2:] = math.nan  # padding
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    behind = torch.tensor([[False, True, True, True], [False, True, False, False]])
    got = exit_features(text, real, behind)
    # sample 0: tokens 1 and 2 (the last is left out); sample 1: only its last token is behind the image
    assert got.tolist() == [[3.0, 4.0, 6.0, 7.0], [0.0, 0.0, 10.0, 11.0]]
    whole = exit_features(text, real, real)
    assert whole.tolist() == [[2.0, 3.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]


def test_the_gate_reads_the_layer_it_sits_behind(tmp_path: Path) -> None:
    """The features of a run equal those taken by hand from the hidden states of the unpruned model."""
    model, inputs = llava(), batch(Row(1, 3, 5, 0))
    seen: list[torch.Tensor] = []

    class Watching(DyVTE):
        def count(self, view: Any) -> torch.Tensor:
            seen.append(self.features(view))
            return view.valid.sum(1)

    scorer = Watching(weights=weights("dyvte", Fingerprint.of(model)))
    with torch.no_grad(), vtprune.prune(model, scorer):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(seen) == LAYERS - 1
    for layer, got in enumerate(seen):
        after = states[layer + 1][0, 3 + TOKENS :]
        torch.testing.assert_close(got[0], torch.cat([after[:-1].mean(0), after[-1]]))


# exits


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_forced_exit_equals_the_masked_oracle(layer: int) -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, DyVTE(exit_layer=layer)) as session:
        out, report = model.generate(**inputs, **GREEDY), session.report
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=6, do_sample=False)
    assert [t[layer : layer + 2] for t in report.tokens_per_layer] == [(n, 0) for n in (TOKENS, 2 * TOKENS, 0, TOKENS)]
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model.generate(**inputs, **GREEDY)
    assert torch.equal(out.sequences, want.sequences)
    same_scores(out, want)
    with masked(model, [h.repeat_interleave(3, 0) for h in hidden_keys(report, inputs["input_ids"], LAYERS)]):
        assert torch.equal(beams, model.generate(**inputs, num_beams=3, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "internvl", "llava_next"])
def test_exits_are_exact_on_families(name: str) -> None:
    case = CASES[name]
    model = case.model()
    inputs = case.batch(
        FamilyRow((("image", case.sizes[0]),), 3, 5, 0), FamilyRow((("image", case.sizes[1]),), 4, 9, 1)
    )
    result = vtprune.verify(model, inputs, DyVTE(exit_layer=1))
    assert result.exact
    assert result.told_apart
    assert all(t[1] > 0 and not any(t[2:]) for t in result.report.tokens_per_layer)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_samples_leave_when_they_like_and_know_no_batch_mates(tmp_path: Path, attention: str) -> None:
    model = llava(attention)
    method = gates_for(model, tmp_path, [1.0, 1.0, 1.0])
    rows = tuple(Row(1, 3, 5 + seed % 3, seed) for seed in range(8))
    inputs = batch(*rows)
    with vtprune.prune(model, method) as session:
        together, report = model.generate(**inputs, **GREEDY), session.report
        exits = {tokens.count(TOKENS) for tokens in report.tokens_per_layer}
        assert len(exits) >= 3, "all samples left alike, so the test shows nothing"
        assert LAYERS in exits, "no sample kept its tokens to the end"
        for b, row in enumerate(rows):
            alone = model.generate(**batch(row), **GREEDY)
            assert session.report.tokens_per_layer == (report.tokens_per_layer[b],)
            assert torch.equal(together.sequences[b, -8:], alone.sequences[0, -8:])
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model.generate(**inputs, **GREEDY)
    assert torch.equal(together.sequences, want.sequences)
    same_scores(together, want)


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_each_gate_decides_behind_its_own_layer(tmp_path: Path, layer: int) -> None:
    """The other gates are silent; of a gate and its opposite one says leave."""
    model, seen = llava(), set()
    for sign in (1.0, -1.0):
        biases = [sign * (layer == at) for at in range(LAYERS - 1)]
        with vtprune.prune(model, gates_for(model, tmp_path / str(sign), biases)) as session:
            model(**batch(Row()))
            seen.add(session.report.tokens_per_layer[0])
    left = LAYERS - 1 - layer
    assert seen == {(TOKENS,) * LAYERS, (TOKENS,) * (LAYERS - left) + (0,) * left}


@torch.no_grad()
def test_no_exit_opens_no_group_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened = llava(), []
    real = Prefill._open_group
    monkeypatch.setattr(Prefill, "_open_group", lambda *given: opened.append(given[1]) or real(*given))
    with vtprune.prune(model, DyVTE(weights=weights("dyvte", Fingerprint.of(model)), margin=1e9)):
        model(**batch(Row()))
    assert opened == [0], "masks and angles were made again though nothing had left"


@torch.no_grad()
def test_no_exit_changes_nothing_and_the_margin_moves_exits() -> None:
    model, inputs = llava(), batch(*RAGGED)
    base, folder = model(**inputs), weights("dyvte", Fingerprint.of(model))
    spent = []
    for margin in (1e9, 0.0, -1e9):
        with vtprune.prune(model, DyVTE(weights=folder, margin=margin)) as session:
            out = model(**inputs)
            spent.append(session.report.flops)
            if margin == 1e9:
                assert torch.equal(out.logits, base.logits)
                assert session.report.tokens_per_layer == tuple((n,) * LAYERS for n in (16, 32, 0, 16))
                assert session.report.kv_bytes == session.report.kv_bytes_full
    assert spent[0] == session.report.flops_full > spent[1] >= spent[2]
    assert [tokens[1] for tokens in session.report.tokens_per_layer] == [0, 0, 0, 0]


@torch.no_grad()
def test_first_is_the_earliest_exit() -> None:
    model = llava()
    folder = weights("dyvte", Fingerprint.of(model))
    with vtprune.prune(model, DyVTE(weights=folder, margin=-1e9, first=2)) as session:
        model(**batch(Row()))
        assert session.report.tokens_per_layer == ((TOKENS,) * 3 + (0,),)


@torch.no_grad()
def test_gates_are_asked_in_the_prefill_only() -> None:
    """Decode steps, where the authors' code fails if no gate has said "leave" before."""
    model = llava()
    method = DyVTE(weights=weights("dyvte", Fingerprint.of(model)), margin=1e9)
    want = model.generate(**batch(Row()), max_new_tokens=8, do_sample=False)
    with vtprune.prune(model, method):
        assert torch.equal(model.generate(**batch(Row()), max_new_tokens=8, do_sample=False), want)


def test_composes_with_a_method_in_front() -> None:
    model, inputs = llava(), batch(*RAGGED)
    for chain in (["uniform", DyVTE(exit_layer=1)], f"uniform@1/2+{'dyvte(exit_layer=1)'}"):
        keep = [0.5, None] if isinstance(chain, list) else None
        result = vtprune.verify(model, inputs, chain, keep)  # type: ignore[arg-type]
        assert result.exact
        assert [t[:3] for t in result.report.tokens_per_layer] == [(n, n, 0) for n in (8, 16, 0, 8)]


# what is refused


def test_takes_no_budget() -> None:
    model = llava()
    with pytest.raises(BudgetError, match=r"decides by itself when tokens leave and takes no budget, got 0\.5 of the"):
        vtprune.prune(model, ready("dyvte", model), 0.5)
    with vtprune.prune(model, ready("dyvte", model), 1.0), torch.no_grad():
        out = model(**batch(Row())).logits
    assert torch.equal(out, model(**batch(Row())).logits)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"margin": "big"}, "margin must be a number"),
        ({"first": -1}, "first must be a layer"),
        ({"exit_layer": 1.5}, "exit_layer must be a layer"),
        ({"read": "some"}, "read must be 'behind' or 'all'"),
        ({"weights": 3}, "weights must be a folder"),
        ({"check": 1}, "check must be True or False"),
    ],
)
def test_knobs_are_checked(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"dyvte {message}"):
        DyVTE(**knobs)


@pytest.mark.parametrize("knob", ["first", "exit_layer"])
def test_an_exit_behind_the_last_layer_is_refused(knob: str) -> None:
    geometry = vtprune.geometry(llava().config)
    with pytest.raises(PlanError, match=rf"dyvte {knob} must be in \[0, 2\] \(4 decoder layers"):
        DyVTE(**{knob: 3}).plan(geometry, Budget(None))


def test_drafts_behind_a_prompt_are_refused() -> None:
    model = llava()
    inputs = {**batch(Row()), "logits_to_keep": 3}
    with vtprune.prune(model, ready("dyvte", model)), pytest.raises(InputError, match="dyvte would read a draft"):
        model(**inputs)


# weights


def test_weights_that_nobody_trained_are_asked_for() -> None:
    with pytest.raises(UntrainedError, match=r"dyvte is learned, and has no weights .* `vtprune train dyvte --model"):
        vtprune.prune(llava(), "dyvte")


def test_weights_of_another_model_are_refused() -> None:
    model, other = llava(), llava(tower="siglip")
    with torch.no_grad():
        other.get_input_embeddings().weight += 0.5
    method = DyVTE(weights=weights("dyvte", Fingerprint.of(other)))
    with pytest.raises(CheckpointError, match=r"not for this model .* differ in the weights themselves"):
        vtprune.prune(model, method)
    with vtprune.prune(model, DyVTE(weights=method.weights, check=False)):
        pass
    deeper = DyVTE(weights=weights("dyvte", Fingerprint("LlavaForConditionalGeneration", 9, 64)), check=False)
    with pytest.raises(CheckpointError, match="they differ in layers of 9"):
        vtprune.prune(model, deeper)


def test_gates_read_what_they_were_trained_to_read(tmp_path: Path) -> None:
    model = llava()
    shape = Fingerprint.of(model)
    ExitGates(shape.to_dict(), shape.layers, shape.hidden, 2, "all").save_pretrained(tmp_path)
    for method in (DyVTE(weights=str(tmp_path)), DyVTE(weights=str(tmp_path), read="all")):
        with vtprune.prune(model, method) as session:
            assert {stage.scorer.read for stage in session.plan.stages} == {"all"}  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match=r"dyvte read is 'all', but the weights .* were trained with 'behind'"):
        vtprune.prune(model, DyVTE(weights=weights("dyvte", shape), read="all"))


def test_half_precision_is_the_same_model() -> None:
    model = llava()
    method = DyVTE(weights=weights("dyvte", Fingerprint.of(model)))
    for dtype in (torch.bfloat16, torch.float16):
        with vtprune.prune(llava().to(dtype), method):
            pass


def test_a_plan_holds_its_weights(tmp_path: Path) -> None:
    model = llava()
    with vtprune.prune(model, ready("dyvte", model)) as session:
        session.plan.save(tmp_path / "plan.json")
        model(**batch(Row()))
        want = session.report.tokens_per_layer
    plan = vtprune.Plan.load(tmp_path / "plan.json")
    assert plan == session.plan
    with vtprune.prune(model, plan) as session:
        model(**batch(Row()))
        assert session.report.tokens_per_layer == want
    with pytest.raises(CheckpointError, match="not for this model"):
        vtprune.prune(CASES["qwen2_vl"].model(), plan)
