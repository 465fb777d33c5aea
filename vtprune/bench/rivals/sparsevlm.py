"""sparsevlm (PyPI, third party): cuts visual rows from the KV cache once a prompt is read, for Qwen2-VL and 2.5-VL."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vtprune.bench.measure import Started
from vtprune.bench.rivals.base import Inputs, Rival, visual_tokens

__all__ = ["RIVAL"]

_SCORING_LAYER = 2  # its default


def _refuses(model: Any, inputs: Inputs) -> str | None:
    if model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        return f"it serves Qwen2-VL and Qwen2.5-VL, not {model.config.model_type}"
    if len(inputs["input_ids"]) > 1:
        return f"it runs batches of 1, not of {len(inputs['input_ids'])}"
    return None


@contextmanager
def _attach(model: Any, inputs: Inputs, keep: int) -> Iterator[Callable[[], Started]]:
    run = importlib.import_module("sparsevlm").sparsevlm_generate
    # other backends return no attention, and all its scores come from there
    model.set_attn_implementation("eager")
    (visual,) = visual_tokens(model, inputs)
    layer = min(_SCORING_LAYER, model.config.get_text_config().num_hidden_layers - 1)
    generate, caches = model.generate, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        caches[:] = [kwargs["past_key_values"]]
        return generate(*args, **kwargs)

    def prefill() -> Started:
        # one token: what its user waits for
        options = {"max_new_tokens": 1, "target_layer": layer, "device": str(model.device)}
        tokens = run(model, None, dict(inputs), n_vis=visual, keep_n_vis=keep, **options)
        return Started(caches.pop(), tokens[:, -1:])

    # it hands out tokens only, and the cache to `generate`
    model.generate = noting
    try:
        yield prefill
    finally:
        del model.generate


RIVAL = Rival(
    name="sparsevlm",
    requires=">=0.1.3,<0.2",
    # it brings a top-level package "kernels"
    install="pip install 'sparsevlm>=0.1.3,<0.2', where Hugging Face's kernels is not installed: it overwrites that",
    does="KV cache cut after the prefill, by the attention of one layer: saves no prefill",
    budget="visual rows of the KV cache, the same in all layers",
    notes=(
        "runs eager attention and returns it from all layers, which it needs for its scores",
        "feeds the last prompt token again before it answers: one decode step more",
        "takes the first rows of the prompt for the visual ones, also where text comes first",
    ),
    flop_ratio=1.0,
    refuses=_refuses,
    attach=_attach,
)
