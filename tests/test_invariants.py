"""DESIGN invariants on tiny random models: identity, masked oracle, batch independence, removal, budget, autograd."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from learned import BUDGETED, IN_STILLS, ready
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, same_scores
from torch import Tensor, nn

import vtprune
from vtprune.contract import Scorer, TokenView

BACKENDS = ["sdpa", "eager"]
DROPPING = ["random", "uniform", "fastv", "divprune"]
RAGGED = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2), Row(1, 6, 2, 3))
GREEDY = {"max_new_tokens": 16, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


def composition() -> list:
    return ["flowcut", vtprune.FastV(layer=2)]


CASES = [
    ("random", 5),
    ("uniform", 0.4),
    ("divprune", 0.25),
    ("fastv", 10),
    ("fastv", 0.5),
    (["uniform", "fastv"], [0.6, 0.3]),
]
IDS = ["random-5", "uniform-40%", "divprune-25%", "fastv-10", "fastv-50%", "uniform+fastv"]


def cache_tensors(output: object) -> list[Tensor]:
    return [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("method", BUDGETED)
def test_keep_all_is_bit_identical(method: str, attention: str) -> None:
    model, inputs = llava(attention), batch(*RAGGED)
    base, base_ids = model(**inputs), model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with vtprune.prune(model, ready(method, model), keep=1.0) as session:
        out, ids = model(**inputs), model.generate(**inputs, max_new_tokens=8, do_sample=False)
        report = session.report
    assert torch.equal(base.logits, out.logits)
    assert torch.equal(base_ids, ids)
    assert all(torch.equal(a, b) for a, b in zip(cache_tensors(base), cache_tensors(out), strict=True))
    assert report.tokens_per_layer == tuple((n,) * LAYERS for n in (TOKENS, 2 * TOKENS, 0, TOKENS))
    assert (report.flops, report.kv_bytes) == (report.flops_full, report.kv_bytes_full)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("method", BUDGETED)
def test_keeping_every_token_by_count_is_bit_identical_with_hooks_on(method: str, attention: str) -> None:
    model, inputs = llava(attention), batch(Row())
    base = model(**inputs)
    with vtprune.prune(model, ready(method, model), keep=TOKENS):
        out = model(**inputs)
    assert torch.equal(base.logits, out.logits)
    assert all(torch.equal(a, b) for a, b in zip(cache_tensors(base), cache_tensors(out), strict=True))


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize(("method", "keep"), CASES, ids=IDS)
@pytest.mark.parametrize("rows", [(Row(),), RAGGED], ids=["single", "ragged"])
@torch.no_grad()
def test_pruned_run_equals_masked_oracle(rows: tuple[Row, ...], method: object, keep: object, attention: str) -> None:
    model, inputs = llava(attention), batch(*rows)
    with vtprune.prune(model, method, keep) as session:
        logits = model(**inputs).logits
        out = model.generate(**inputs, **GREEDY)
        report = session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
        ref = model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)
    assert torch.equal(out.sequences, ref.sequences)
    for got, wanted in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert not logits[hidden[-1]].any(), "positions that left hold zeros"

    wrong = [torch.roll(h, 1, dims=1) & (inputs["input_ids"] == IMAGE) for h in hidden]
    with masked(model, wrong):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-2, "the oracle must notice when other tokens are hidden"


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@torch.no_grad()
def test_other_decoders_equal_masked_oracle(decoder: str) -> None:
    model, inputs = llava("sdpa", decoder=decoder), batch(*RAGGED)
    with vtprune.prune(model, "fastv", 0.4) as session:
        logits, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("method", ["fastv", "uniform"])
@torch.no_grad()
def test_no_cache_forward_is_exact_too(method: str, attention: str) -> None:
    """Without a cache and a mask the host looks for packed sequences in position_ids."""
    model, inputs = llava(attention), batch(Row())
    inputs.pop("attention_mask")
    with vtprune.prune(model, method, 0.4) as session:
        logits, report = model(**inputs, use_cache=False).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits[~hidden[-1]], want[~hidden[-1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize(
    ("method", "keep"),
    [
        *[(m, 0.4) for m in (*DROPPING, "pool", "flowcut")],
        (composition, [0.6, 0.4]),
        (lambda: vtprune.FastV(positions="compact"), 0.4),
    ],
    ids=[*DROPPING, "pool", "flowcut", "flowcut+fastv", "fastv-compact"],
)
@torch.no_grad()
def test_batch_equals_each_sample_alone(method: object, keep: object, attention: str) -> None:
    model, inputs = llava(attention), batch(*RAGGED)
    method = method() if callable(method) else method
    with vtprune.prune(model, method, keep) as session:
        together = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        kept = session.report.kept
        for b, row in enumerate(RAGGED):
            one = batch(row)
            alone = model.generate(**one, max_new_tokens=16, do_sample=False)
            assert torch.equal(together[b, -16:], alone[0, -16:]), f"sample {b}"
            if row.images:
                for all_rows, single in zip(kept, session.report.kept, strict=True):
                    assert torch.equal(all_rows.indices[b], single.indices[0]), f"sample {b} at {single.site}"


@pytest.mark.parametrize("attention", BACKENDS)
@torch.no_grad()
def test_pool_equals_the_unpruned_model_on_averaged_features(attention: str) -> None:
    model, inputs = llava(attention), batch(Row(1, 3, 5, 0), Row(1, 1, 4, 1))
    with vtprune.prune(model, "pool", 4) as session:
        logits, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=16, do_sample=False)
        report = session.report
    features = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    cells = features.view(2, 2, 2, 2, 2, -1).mean((2, 4))  # 4 x 4 tokens into 2 x 2 cells
    for image, kept in enumerate(report.kept[0].indices):
        for token in kept.tolist():
            row, col = token // 4, token % 4
            features[image, token] = cells[image, row // 2, col // 2]
        assert sorted((t // 8, t % 4 // 2) for t in kept.tolist()) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden, features):
        want, ref = model(**inputs).logits, model.generate(**inputs, max_new_tokens=16, do_sample=False)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, ref)


@dataclass(frozen=True)
class Absorb(Scorer):
    """Keeps the first tokens and averages all others into the very first, which `pool` never does."""

    name: ClassVar[str] = "absorb"
    merges: ClassVar[bool] = True

    def score(self, view: TokenView) -> Tensor:
        return -view.original.float()

    def assign(self, view: TokenView, kept: Tensor) -> Tensor:
        return torch.arange(kept.shape[1]).expand_as(kept).where(kept, 0)


@torch.no_grad()
def test_merging_after_a_cut_in_a_ragged_batch_that_starts_with_images() -> None:
    """Padding of the token axis must not write over the first row, which is visual here."""
    model, rows = llava(), (Row(1, 0, 40, 0), Row(2, 0, 4, 1), Row(0, 2, 9, 2))
    stages = (
        vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 0.75),
        vtprune.Stage(vtprune.Site("layer", 2), Absorb(), 0.25),
    )
    with vtprune.prune(model, vtprune.Plan(stages)):
        together = model(**batch(*rows)).logits
        for b, row in enumerate(rows):
            alone = model(**batch(row)).logits
            torch.testing.assert_close(together[b, -4:], alone[0, -4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["fastv", "uniform", "flowcut"])
@torch.no_grad()
def test_right_padding_agrees_with_left_padding(method: str) -> None:
    model = llava()
    left, right = batch(*RAGGED), batch(*RAGGED, left=False)
    with vtprune.prune(model, method, 0.4):
        a, b = model(**left).logits, model(**right, position_ids=None).logits
        for row in range(len(RAGGED)):
            one = batch(RAGGED[row])
            want = model(**one).logits[0]
            # without explicit position_ids HF counts padding, so only the right-padded rows match the lone sample
            torch.testing.assert_close(b[row][right["attention_mask"][row].bool()], want, atol=1e-5, rtol=1e-5)
    assert a.shape == b.shape


@pytest.mark.parametrize("method", ["fastv", "uniform"])
@torch.no_grad()
def test_compact_positions_equal_a_prompt_without_the_dropped_tokens(method: str) -> None:
    """With compact ids from the input on, the decoder cannot tell that there ever were more tokens."""
    model, inputs = llava(), batch(Row())
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 6, positions="compact"),))
    with vtprune.prune(model, plan) as session:
        out = model.generate(**inputs, **GREEDY)
        kept = session.report.kept[0].indices[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    embeds[0, visual] = features
    stay = torch.ones(embeds.shape[1], dtype=torch.bool)
    stay[visual] = False
    stay[visual[kept]] = True
    ref = model.generate(inputs_embeds=embeds[:, stay], **GREEDY)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], ref.sequences)
    for got, want in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@torch.no_grad()
def test_compact_positions_from_a_layer_on_equal_the_oracle(attention: str) -> None:
    """Layers from 2 on: keys hidden, and rotary angles of the sequence renumbered without them, at every step."""
    model, inputs = llava(attention), batch(Row())
    with vtprune.prune(model, vtprune.FastV(layer=2, positions="compact"), 0.6) as session:
        out = model.generate(**inputs, **GREEDY)
        report = session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    text = model.model.language_model
    gone, handles = hidden[2], []

    def renumber(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        position = kwargs["position_ids"]
        shift = gone.cumsum(1) if position.shape[1] == gone.shape[1] else gone.sum(1, keepdim=True)
        return args, {**kwargs, "position_embeddings": text.rotary_emb(args[0], position_ids=position - shift)}

    for layer in text.layers[2:]:
        handles.append(layer.register_forward_pre_hook(renumber, with_kwargs=True))
    with masked(model, hidden):
        ref = model.generate(**inputs, **GREEDY)
    for handle in handles:
        handle.remove()
    assert torch.equal(out.sequences, ref.sequences)
    for got, want in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def snapshot(model: nn.Module) -> dict:
    """Every attribute, hook and config object of every module, by identity."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[name, key] = {k: id(v) for k, v in value.items()}
            else:
                state[name, key] = id(value) if not isinstance(value, (int, float, str, bool)) else value
        if hasattr(module, "config"):
            state[name, "config dict"] = copy.deepcopy(module.config.to_dict())
            state[name, "attention"] = module.config._attn_implementation
    return state


@pytest.mark.parametrize("method", IN_STILLS)
@torch.no_grad()
def test_remove_leaves_nothing(method: str) -> None:
    model, inputs = llava(), batch(*RAGGED)
    base = model(**inputs).logits  # also lets HF install its own capture hooks
    before, keys = snapshot(model), list(model.state_dict())
    session = vtprune.prune(model, ready(method, model), 0.7)
    assert snapshot(model) != before
    assert not torch.equal(model(**inputs).logits, base)
    session.remove()
    session.remove()
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**inputs).logits, base)


@torch.no_grad()
def test_exception_inside_a_forward_leaves_no_state() -> None:
    model, inputs = llava(), batch(*RAGGED)
    base = model(**inputs).logits
    with vtprune.prune(model, ["flowcut", "fastv"], [0.6, 0.4]) as session:
        want = model(**inputs).logits
        for site in (model.model.language_model.layers[2].mlp, model.model.vision_tower.encoder.layers[4].mlp):
            boom = site.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError("boom")))
            with pytest.raises(RuntimeError, match="boom"):
                model(**inputs)
            boom.remove()
            assert (session._calls.decoder, session._tower._runs.call) == (None, None)
            assert torch.equal(model(**inputs).logits, want)
    assert torch.equal(model(**inputs).logits, base)


# (K V + L - K) / L of fastv, (r V + L) / L of gemfilter, three cuts before layers 1, 2 and 3 of
# transprune and pyramiddrop, and of atp, 3/4 of the rest at each; all of a still image
FLOORS = {
    "atp": 6,
    "dart": 4.75,
    "evs": 16,
    "fastv": 4.75,
    "flowcut-text": 4.75,
    "gemfilter": 9,
    "pyramiddrop": (16 + 7 + 3 + 1) / 4,
    "sparsevlm": (16 + 8 + 3 + 1) // 4,
    "spatten": (16 + 3 + 2 + 1) / 4,
    "transprune": (16 + 14 + 10 + 1) / 4,
}


@pytest.mark.parametrize("method", BUDGETED)
@pytest.mark.parametrize("keep", [1, 3, 8, 15, 0.5, 1 / 3, 0.99])
@torch.no_grad()
def test_realised_budget_is_within_one_token(method: str, keep: float) -> None:
    model = llava()
    if (keep if isinstance(keep, int) else keep * TOKENS) + 1 < FLOORS.get(method, 1):
        with pytest.raises(vtprune.BudgetError, match=rf"at least {FLOORS[method]}\b") as caught:
            vtprune.prune(model, ready(method, model), keep)
        assert caught.value.floor == FLOORS[method]
        return
    session = vtprune.prune(model, ready(method, model), keep)
    rows = (Row(1, 3, 5, 0), Row(1, 5, 1, 4)) if isinstance(keep, int) else (Row(1), Row(2, 1, 4, 1))
    with session:
        model(**batch(*rows))
        report = session.report
    for row, average in zip(rows, report.average_tokens, strict=True):
        total = row.images * TOKENS
        want = keep if isinstance(keep, int) else keep * total
        assert abs(average - want) <= 1
    for record in report.kept:
        for indices, row in zip(record.indices, rows, strict=True):
            assert (indices.diff() > 0).all()
            assert indices.min() >= 0
            assert indices.max() < row.images * TOKENS


@pytest.mark.parametrize("method", IN_STILLS)
@torch.no_grad()
def test_rng_is_untouched_and_result_repeats(method: str) -> None:
    model, inputs = llava(), batch(*RAGGED)
    with vtprune.prune(model, ready(method, model), 0.7) as session:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        first, kept = model(**inputs).logits, session.report.kept
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(8)
        assert torch.equal(model(**inputs).logits, first)
        for a, b in zip(kept, session.report.kept, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))


@pytest.mark.parametrize("method", ["fastv", "uniform", "pool", "flowcut"])
def test_gradients_flow_and_equal_the_oracle(method: str) -> None:
    model, inputs = llava(), batch(*RAGGED)
    # answers only: the position that predicts the first token after an image is visual and may have left
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtprune.prune(model, method, 0.4) as session:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        report = session.report
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["model.language_model.layers.3.mlp.up_proj.weight"].abs().sum() > 0
    assert grads["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0
    if method in ("pool", "flowcut"):
        return
    model.zero_grad()
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model(**inputs, labels=labels, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for name in (
        "model.language_model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ):
        torch.testing.assert_close(grads[name], model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_text_prompt_that_is_the_longest_leaves_the_others_exact() -> None:
    """It keeps every row, so there are as many rows as positions, but those of the others have moved."""
    model, inputs = llava(), batch(Row(1, 3, 5, 0), Row(0, 2, 40, 2))
    with vtprune.prune(model, ["uniform", "fastv"], [0.6, 0.4]) as session:
        out, report = model.generate(**inputs, **GREEDY), session.report
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model.generate(**inputs, **GREEDY)
    same_scores(out, want)
