"""Counted cost against `FlopCounterMode` and against the tensors a cache really holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learned import IN_STILLS, ready
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import vtprune
from vtprune.bench.measure import cache_bytes
from vtprune.cost import kv_bytes, prefill_flops, vision_flops
from vtprune.presets import build_random, random_inputs


def _cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the counter knows the CUDA attention operators; this is the CPU one
_MAPPING = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa}


def _counted(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int, Any]:
    """(decoder, tower and projector) FLOPs as executed, and the output."""
    with FlopCounterMode(display=False, custom_mapping=_MAPPING) as counter, torch.no_grad():
        out = model(**inputs, use_cache=True)
    counts = {name.partition(".model.")[2]: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    return counts["language_model"], counts["vision_tower"] + counts["multi_modal_projector"], out


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
def test_unpruned_counts_agree_with_the_counter(attn: str, batch: int) -> None:
    model = build_random("mini", attn_implementation=attn)
    inputs = random_inputs(model, batch=batch, text_tokens=13)
    geometry = vtprune.geometry(model.config)
    decoder, tower, out = _counted(model, inputs)
    lengths = [inputs["input_ids"].shape[1]] * geometry.layers
    assert geometry.vision is not None
    blocks = [geometry.visual_tokens + int(geometry.vision.has_cls)] * geometry.vision.blocks
    assert batch * prefill_flops(geometry, lengths) == pytest.approx(decoder, rel=0.01)
    assert batch * vision_flops(geometry, blocks, geometry.visual_tokens) == pytest.approx(tower, rel=0.01)
    assert batch * kv_bytes(geometry, lengths, 4) == cache_bytes(out.past_key_values)[0]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("method", IN_STILLS)
def test_pruned_report_agrees_with_the_counter(method: str, attn: str) -> None:
    model = build_random("mini", attn_implementation=attn)
    inputs = random_inputs(model, batch=2, text_tokens=13)
    # in four layers, asking some of them costs as much as is saved, and cannot save half
    asks = method in ("gemfilter", "pyramiddrop", "transprune")
    with vtprune.prune(model, ready(method, model), keep=0.7 if asks else 0.5) as session:
        decoder, tower, out = _counted(model, inputs)
        report = session.report
    # scoring is not counted, and here the rows of all raters in three of four layers are more than a little
    assert report.flops == pytest.approx(decoder, rel={"sparsevlm": 0.02, "spatten": 0.04}.get(method, 0.01))
    # nor are the products of all pairs of patches, which weigh more where blocks are narrow
    pairs = method in ("hiprune", "scope", "vispruner")
    assert report.vision_flops == pytest.approx(tower, rel=0.03 if pairs else 0.01)
    assert report.kv_bytes == cache_bytes(out.past_key_values)[0]
    assert asks or report.flops < report.flops_full
    assert report.kv_bytes < report.kv_bytes_full


def test_past_keys_are_counted() -> None:
    model = build_random("mini", attn_implementation="eager")
    geometry = vtprune.geometry(model.config)
    inputs = random_inputs(model, text_tokens=13)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    past = inputs["input_ids"].shape[1]
    step = {
        "input_ids": inputs["input_ids"][:, -1:],
        "attention_mask": torch.ones(1, past + 1, dtype=torch.long),
        "past_key_values": cache,
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**step)
    counted = sum(counter.get_flop_counts()["LlavaForConditionalGeneration.model.language_model"].values())
    ours = prefill_flops(geometry, [1] * geometry.layers, [past] * geometry.layers)
    assert ours == pytest.approx(counted, rel=0.01)
