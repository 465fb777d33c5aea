"""Sliding windows, two-way blocks and soft caps: signals, counted cost and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_models import CASES, LAYERS, Row
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vtprune
from vtprune.hooks.cache import Group
from vtprune.hooks.families.base import family_of
from vtprune.hooks.masks import Masks

ONE = (("image", None),)
ROWS = (Row(ONE, 3, 5, 0), Row(ONE * 2, 1, 4, 1), Row((), 2, 9, 2), Row(ONE, 6, 2, 3))
EXACT = {"atol": 1e-5, "rtol": 1e-5}
GEMMA3_BREAKS = pytest.mark.skipif(not CASES["gemma3"].turns, reason="this transformers fails on it by itself")


def held_bytes(cache: DynamicCache) -> int:
    """Bytes of keys and values. A sliding layer holds views of longer tensors until the next step: the host's doing."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_fastv_scores_are_the_attention_that_the_model_computes(layer: int, name: str) -> None:
    """Layer 0 slides, layer 1 does not; Gemma 2 caps its logits."""
    case = CASES[name]
    model, inputs = case.model("eager"), case.batch(*ROWS)
    maps = model(**inputs, output_attentions=True).attentions[layer - 1].mean(1)
    with vtprune.prune(model, vtprune.FastV(layer=layer), 0.6, record_scores=True) as session:
        model(**inputs)
        scores = session.report.kept[0].scores
    assert scores is not None
    for b in range(len(ROWS)):
        visual = case.visual(inputs["input_ids"])[b]
        torch.testing.assert_close(scores[b], maps[b, -1, visual], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("knows_windows", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@pytest.mark.parametrize("keep", [0.5, 1.0])
@torch.no_grad()
def test_counted_cost_is_that_of_the_run(keep: float, name: str, knows_windows: bool) -> None:
    case = CASES[name]
    model, inputs = case.model("eager"), case.batch(ROWS[0], ROWS[3])
    cache = DynamicCache(**({"config": model.config.text_config} if knows_windows else {}))
    with vtprune.prune(model, "fastv", keep) as session:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, past_key_values=cache)
        report = session.report
    counted = sum(counter.get_flop_counts()[f"{case.model_class}.model.language_model"].values())
    assert report.flops == pytest.approx(counted, rel=0.01)
    assert report.kv_bytes == held_bytes(cache)


@GEMMA3_BREAKS
@torch.no_grad()
def test_a_later_turn_is_charged_for_the_keys_that_the_windows_left() -> None:
    case = CASES["gemma3"]
    model, first, second = case.model("eager"), case.batch(ROWS[0]), case.batch(Row(ONE, 2, 3, 20))
    cache = DynamicCache(config=model.config.text_config)
    with vtprune.prune(model, "fastv", 0.5) as session:
        model(**first, past_key_values=cache)
        ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
        call = {**second, "attention_mask": torch.ones_like(ids), **case.extra(ids), "past_key_values": cache}
        with FlopCounterMode(display=False) as counter:
            model(**call)
        report = session.report
    counted = sum(counter.get_flop_counts()[f"{case.model_class}.model.language_model"].values())
    assert report.flops == pytest.approx(counted, rel=0.01)
    assert report.kv_bytes == held_bytes(cache)


# refusals


@pytest.mark.parametrize(("name", "slides"), [("gemma3", True), ("gemma3", False), ("paligemma2", True)])
def test_renumbered_positions_are_refused_where_windows_slide(name: str, slides: bool) -> None:
    """Gemma 3 has a rotary table for each kind of layer, also where no layer slides."""
    config = CASES[name].config()
    if not slides:
        config.text_config.layer_types = ["full_attention"] * LAYERS
    model = getattr(transformers, CASES[name].model_class)._from_config(config, attn_implementation="eager")
    with pytest.raises(vtprune.PlanError, match="no meaning where layers have sliding windows"):
        vtprune.prune(model, vtprune.FastV(positions="compact"), 0.5)


@torch.no_grad()
def test_gemma3_without_windows_and_token_types_runs_on_masks_of_the_host() -> None:
    """Nothing there needs masks of our own, so that the backend is free."""
    config = CASES["gemma3"].config()
    config.text_config.layer_types = ["full_attention"] * LAYERS
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    inputs = CASES["gemma3"].batch(ROWS[0])
    del inputs["token_type_ids"]
    masks: list[Any] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    with vtprune.prune(model, "fastv", 0.5):
        model(**inputs)
        assert masks[1:] == [None] * 3
    parts = family_of(config)(model).parts()
    parts.text_model.config._attn_implementation = "flash_attention_2"
    assert Masks(parts, None).plain


def test_columns_end_where_rejected_drafts_were_taken_out() -> None:
    columns = torch.tensor([[0, 3, 4, 7, 8, 9]])
    group = Group(1, columns, 6, None, dense=True)
    assert group.columns_to(4, 10, 1, columns.device).tolist() == [[0, 3, 4, 7]]
    assert group.columns_to(8, 10, 1, columns.device).tolist() == [[0, 3, 4, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_backends_that_take_no_mask_are_refused_before_the_model_runs(name: str) -> None:
    case = CASES[name]
    model, inputs = case.model(), case.batch(ROWS[0])
    ran: list[int] = []
    model.model.language_model.register_forward_pre_hook(lambda m, a: ran.append(1))
    with vtprune.prune(model, "fastv", 0.5):
        model.model.language_model.config._attn_implementation = "flex_attention"
        with pytest.raises(vtprune.InputError, match=r"attention 'flex_attention' counts .* sdpa or eager"):
            model(**inputs)
        assert not ran
        model.model.language_model.config._attn_implementation = "sdpa"
        model(**inputs)


@GEMMA3_BREAKS
@torch.no_grad()
def test_a_static_cache_is_left_alone_by_a_session_that_keeps_all() -> None:
    case = CASES["gemma3"]
    model, inputs = case.model(), case.batch(ROWS[0])
    call = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    want = model.generate(**inputs, **call)
    with vtprune.prune(model, "fastv", 1.0):
        assert torch.equal(model.generate(**inputs, **call), want)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, r"text_config\.use_bidirectional_attention=True is not"),
        ("gemma3", {"model_type": "gemma2"}, "gemma3 with a 'gemma2' decoder .* gemma3_text"),
        ("paligemma", {"model_type": "llama"}, "paligemma with a 'llama' decoder .* gemma, gemma2"),
    ],
)
def test_refused_decoders(name: str, change: dict[str, Any], message: str) -> None:
    config = CASES[name].config()
    for key, value in change.items():
        # a config class keeps its own type
        config.text_config.__dict__[key] = value
    with pytest.raises(vtprune.UnsupportedModelError, match=message):
        vtprune.geometry(config)


@torch.no_grad()
def test_compact_positions_and_blocks_go_together() -> None:
    """Without windows positions may close up: the run equals one over a prompt that never held the tokens."""
    case = CASES["paligemma"]
    model, inputs = case.model(), case.batch(ROWS[0])
    stage = vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 6, positions="compact")
    with vtprune.prune(model, vtprune.Plan((stage,))) as session:
        got = model(**inputs).logits
        (kept,) = session.report.kept[0].indices
    visual = case.visual(inputs["input_ids"])[0].nonzero()[:, 0]
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[visual] = False
    stays[visual[kept]] = True
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, visual] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    want = model(inputs_embeds=embeds[:, stays], token_type_ids=torch.zeros_like(stays[stays])[None].long()).logits
    torch.testing.assert_close(got[:, stays], want, **EXACT)
