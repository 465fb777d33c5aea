"""DESIGN invariants for every family, on tiny random models of the real classes.

`pytest tests/test_families.py tests/test_family_pixels.py --family-table docs/families.md` writes what passed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from family_checks import batch_equals_each_alone
from family_models import CASES, HOST_ENCODES_FIRST, HOST_KEEPS_BEAM_ORDER, LAYERS, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor

import vtprune
from vtprune.hooks.families.base import family_of

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
    base, ids = model(**inputs, use_cache=True), model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with vtprune.prune(model, "fastv", keep=1.0) as session:
        out, got = model(**inputs, use_cache=True), model.generate(**inputs, max_new_tokens=6, do_sample=False)
        report = session.report
    assert torch.equal(base.logits, out.logits)
    assert torch.equal(ids, got)
    assert all(torch.equal(a, b) for a, b in zip(cache_tensors(base), cache_tensors(out), strict=True))
    assert report.visual_tokens == tuple(case.visual(inputs["input_ids"]).sum(1).tolist())


def equals_masked_oracle(case: Case, attention: str, rows: tuple[Row, ...], method: Any, keep: Any) -> vtprune.Report:
    """Logits, scores and tokens are those of the unpruned model with the dropped keys hidden, and with no others."""
    model, inputs = case.model(attention), case.batch(*rows)
    with vtprune.prune(model, method, keep) as session:
        logits, out, report = model(**inputs).logits, model.generate(**inputs, **GREEDY), session.report
    visual = case.visual(inputs["input_ids"])
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, visual)
    with masked(model, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    for got, wanted in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)

    wrong = [torch.roll(h, 1, dims=1) & visual for h in hidden]
    with masked(model, wrong):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-3, "the oracle must notice when other tokens are hidden"
    return report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "keep"), METHODS, ids=IDS)
@pytest.mark.parametrize("rows", [one, ragged])
@torch.no_grad()
def test_pruned_run_equals_masked_oracle(case: Case, rows: Any, method: str, keep: Any, attention: str) -> None:
    equals_masked_oracle(case, attention, rows(case), method, keep)


@pytest.mark.parametrize(
    ("method", "keep"), [*METHODS, ("pool", 0.3), ("divprune", 0.3)], ids=[*IDS, "pool", "divprune"]
)
@torch.no_grad()
def test_batch_equals_each_sample_alone(case: Case, method: str, keep: Any) -> None:
    model = case.model()
    if method == "pool" and vtprune.geometry(model).deepstack:
        with pytest.raises(vtprune.PlanError, match="DeepStack"):
            vtprune.prune(model, method, keep)
        return
    batch_equals_each_alone(case, model, ragged(case), method, keep)


# a pass that is broken off, sublayers that are watched, layers that are asked: everything that reads a decoder
ASKING = [
    vtprune.GemFilter(layer=1, positions="keep"),
    vtprune.TransPrune(layers=(1, 2, 3), positions="keep"),
]
NAMED: dict[str, Any] = {"gemfilter": ASKING[0], "transprune": ASKING[1]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_layers_that_are_asked_equal_masked_oracle(case: Case, attention: str) -> None:
    report = equals_masked_oracle(case, attention, ragged(case), ASKING, [0.75, 0.45])
    assert [str(record.site) for record in report.kept] == ["restart[1]", "layer[1]", "layer[2]", "layer[3]"]


@torch.no_grad()
def test_layers_that_are_asked_know_no_batch_mates(case: Case) -> None:
    batch_equals_each_alone(case, case.model(), ragged(case), ASKING, [0.75, 0.45])


@pytest.mark.parametrize("method", ["uniform", "fastv", "gemfilter"])
@torch.no_grad()
def test_beams_equal_masked_oracle(case: Case, method: str) -> None:
    rows = ragged(case)
    if not case.beams_keep_order:
        rows = (rows[0], rows[2], Row(rows[0].media, 6, 2, 3))
    model, inputs = case.model(), case.batch(*rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    with vtprune.prune(model, NAMED.get(method, method), 0.5) as session:
        out = model.generate(**inputs, **beams)
        report = session.report
    wide = inputs["input_ids"].repeat_interleave(3, 0)
    with masked(model, hidden_keys(report, wide, LAYERS, case.visual(wide))):
        assert torch.equal(out, model.generate(**inputs, **beams))


@pytest.mark.skipif(not HOST_KEEPS_BEAM_ORDER, reason="this transformers has other ways to go wrong here")
@torch.no_grad()
def test_images_that_the_host_puts_into_the_wrong_order_are_refused() -> None:
    """GLM-4.1V under beams repeats image by image (A A B B) where the prompts want A B A B (transformers 5.23)."""
    case = CASES["glm4v"]
    model, inputs = case.model(), case.batch(ragged(case)[1])
    with vtprune.prune(model, "uniform", 0.5), pytest.raises(vtprune.InputError, match="do not make whole images"):
        model.generate(**inputs, num_beams=3, max_new_tokens=2)


@pytest.mark.parametrize("method", ["uniform", "fastv"])
@torch.no_grad()
def test_videos_equal_masked_oracle(case: Case, method: str) -> None:
    if not case.videos:
        pytest.skip("no videos of their own kind")
    rows = (
        Row((("video", case.videos[0]),), 3, 5, 0),
        Row((("image", case.sizes[0]) if case.mixes else ("video", case.videos[1]),), 1, 3, 4),
    )
    equals_masked_oracle(case, "sdpa", rows, method, 0.5)


@torch.no_grad()
def test_cuts_in_the_tower_run_or_are_refused(case: Case, record_property: Any) -> None:
    """What they must equal is tested in test_family_towers.py."""
    model, inputs = case.model(), case.batch(Row((("image", (case.tower_sizes or case.sizes)[0]),)))
    if vtprune.geometry(model).vision is None:
        with pytest.raises(vtprune.UnsupportedModelError, match="offers no tower block before its features") as refused:
            vtprune.prune(model, "flowcut", 0.5)
        record_property("refusal", str(refused.value))
        return
    with vtprune.prune(model, "flowcut", 0.5) as session:
        model(**inputs)
    assert session.report.kept[0].site.kind == "vision"
    assert session.report.vision_flops < session.report.vision_flops_full


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


@torch.no_grad()
def test_remove_gives_back_a_method_that_the_user_had_replaced() -> None:
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(*one(case))
    calls = []
    encode = model.model.get_image_features

    @functools.wraps(encode)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(*args, **kwargs)

    model.model.get_image_features = mine
    with vtprune.prune(model, "uniform", 0.5):
        model.generate(**inputs, max_new_tokens=1)
    assert model.model.get_image_features is mine
    assert len(calls) == 1


def test_gradients_flow_and_equal_the_oracle(case: Case) -> None:
    model, inputs = case.model(), case.batch(*one(case))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtprune.prune(model, "fastv", 0.5) as session:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        report = session.report
    names = [n for n, _ in model.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight")]
    weight = next(n for n in names if "language_model" in n or "text_model" in n)
    got = model.get_parameter(weight).grad.clone()
    model.zero_grad()
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs, labels=labels, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(got, model.get_parameter(weight).grad, atol=1e-4, rtol=1e-4)


def converse(
    case: Case, model: Any, turns: list[dict[str, Any]], session: Any = None, *, encode: bool = False
) -> tuple[Tensor, list[Any]]:
    """Several turns over one cache. Returns all ids, and the report of every turn that brought an image.

    Under M-RoPE `generate` counts positions from the grids of all images, but encodes the pixels of this turn with the
    same grids, so that a new image needs positions of one's own or features encoded by hand (`encode`).
    """
    cache, ids, reports, grids = transformers.DynamicCache(config=model.config.text_config), None, [], []
    for turn in turns:
        ids = turn["input_ids"] if ids is None else torch.cat([ids, turn["input_ids"]], 1)
        extra = case.extra(ids)
        pictures = {k: v for k, v in turn.items() if k not in ("input_ids", "attention_mask", *extra)}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra, **pictures}
        grids += [turn["image_grid_thw"]] if "image_grid_thw" in turn else []
        if pictures and len(grids) > 1 and encode:
            features = model.model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
            inputs |= {"image_grid_thw": torch.cat(grids), "mm_encoder_outputs": {"image": features}}
        elif pictures and len(grids) > 1:
            inputs["position_ids"] = model.model.get_rope_index(ids, image_grid_thw=torch.cat(grids), **extra)[0]
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        if session is not None and pictures:
            reports.append(session.report)
    return ids, reports


def turns_equal_masked_oracle(case: Case, method: str, **how: Any) -> None:
    """Turn 2 is text, turn 3 brings a new image."""
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    model = case.model()
    text = {"input_ids": torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(5))}
    turns = [case.batch(*one(case)), text, case.batch(Row((("image", case.sizes[1]),), 2, 3, 20))]
    keep = 0.7 if method == "transprune" else 0.5
    with vtprune.prune(model, NAMED.get(method, method), keep) as session:
        out, reports = converse(case, model, turns, session, **how)
    assert len(reports) == 2
    hidden = [torch.zeros_like(out, dtype=torch.bool) for _ in range(LAYERS)]
    places = case.visual(out)[0].nonzero()[:, 0].split([r.visual_tokens[0] for r in reports])
    for report, positions in zip(reports, places, strict=True):
        here = torch.zeros_like(out, dtype=torch.bool)
        here[0, positions] = True
        for layer, gone in enumerate(hidden_keys(report, out, LAYERS, here)):
            hidden[layer] |= gone
    with masked(model, hidden):
        assert torch.equal(out, converse(case, model, turns, **how)[0])


@pytest.mark.parametrize("method", ["uniform", "fastv", "gemfilter", "transprune"])
@torch.no_grad()
def test_turns_over_one_cache_equal_masked_oracle(case: Case, method: str) -> None:
    turns_equal_masked_oracle(case, method)


@pytest.mark.skipif(not HOST_ENCODES_FIRST, reason="this transformers takes no encoded features")
@pytest.mark.parametrize("method", ["uniform", "fastv"])
@torch.no_grad()
def test_turns_with_features_encoded_by_hand_equal_masked_oracle(method: str) -> None:
    turns_equal_masked_oracle(CASES["qwen2_vl"], method, encode=True)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video", "mistral3"])
def test_images_without_sizes_are_refused(name: str) -> None:
    model, inputs = CASES[name].model(), CASES[name].batch(*one(CASES[name]))
    del inputs["image_sizes"]
    with vtprune.prune(model, "uniform", 0.5), pytest.raises(vtprune.InputError, match=r"1 image.* image_sizes of 0"):
        model(**inputs)


def test_grids_missing_from_a_call_are_named() -> None:
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(*one(case))
    del inputs["image_grid_thw"]
    with vtprune.prune(model, "uniform", 0.5), pytest.raises(vtprune.InputError, match="no image_grid_thw"):
        model(**inputs)


@pytest.mark.skipif(not HOST_ENCODES_FIRST, reason="this transformers takes no encoded features")
@torch.no_grad()
def test_features_encoded_by_hand_are_known_if_encoded_under_the_session() -> None:
    case = CASES["llava_next"]
    model, inputs = case.model(), case.batch(*ragged(case))
    pictures = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes")}
    before = model.get_image_features(**pictures)
    with vtprune.prune(model, "uniform", 0.5) as session:
        want = model(**inputs, **pictures).logits
        features = model.get_image_features(**pictures)
        got = model(**inputs, mm_encoder_outputs={"image": features}).logits
        assert torch.equal(got, want)
        assert session.report.average_tokens[0] < session.report.visual_tokens[0]
        with pytest.raises(vtprune.InputError, match=r"features of 4 image\(s\), of which 4 were not encoded"):
            model(**inputs, mm_encoder_outputs={"image": before})


def test_compact_positions_are_refused_under_mrope() -> None:
    with pytest.raises(vtprune.PlanError, match="no meaning with rotary positions of 3 axes"):
        vtprune.prune(CASES["qwen2_vl"].model(), vtprune.FastV(positions="compact"), 0.5)


def test_merging_where_deepstack_still_adds_features_is_refused() -> None:
    with pytest.raises(vtprune.PlanError, match=r"pool merges tokens at input.*until after layer 1 \(DeepStack\)"):
        vtprune.prune(CASES["qwen3_vl"].model(), "pool", 0.5)


@torch.no_grad()
def test_deepstack_features_go_to_the_tokens_that_are_left() -> None:
    """A cut between the layers that add features: dropping the wrong rows of them would show."""
    case = CASES["qwen3_vl"]
    model, inputs = case.model(), case.batch(*ragged(case))
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", 1), vtprune.Uniform(), 0.4),))
    with vtprune.prune(model, plan) as session:
        logits, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)


@pytest.mark.parametrize("method", ["fastv", "uniform"])
def test_a_static_cache_is_refused_before_the_decoder_runs(case: Case, method: str) -> None:
    model, inputs = case.model(), case.batch(*one(case))
    text = family_of(model.config)(model).parts().text_model
    ran: list[int] = []
    handle = text.register_forward_pre_hook(lambda module, args: ran.append(1))
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    refusal = r"StaticCache, whose layers have one fixed length.*a DynamicCache"
    with vtprune.prune(model, method, 0.4) as session:
        ran.clear()  # of a dry call
        with pytest.raises(vtprune.InputError, match=refusal):
            model.generate(**inputs, max_new_tokens=4, cache_implementation="static")
        assert not ran
        handle.remove()
        # and leaves nothing behind
        model.generate(**inputs, max_new_tokens=4)
        assert session.report.kept


@torch.no_grad()
def test_a_static_cache_passed_by_hand_is_refused() -> None:
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(*one(case))
    cache = transformers.StaticCache(config=model.config, max_cache_len=200)
    with vtprune.prune(model, "fastv", 0.4), pytest.raises(vtprune.InputError, match="the cache is a StaticCache"):
        model(**inputs, past_key_values=cache)
    # a session that keeps all leaves it alone
    with vtprune.prune(model, "fastv", 1.0):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_a_budget_beyond_the_example_image_waits_for_the_prompt() -> None:
    """An example image of Qwen2-VL has 256 tokens; a budget of 300 is fine for a larger one and refused for a small."""
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(*one(case))
    with (
        vtprune.prune(model, "uniform", 300),
        pytest.raises(vtprune.BudgetError, match=r"keep must be in \[1, 16\], got 300"),
    ):
        model(**inputs)
