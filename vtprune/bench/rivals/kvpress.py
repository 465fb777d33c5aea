"""kvpress (NVIDIA): compresses the KV cache once a prompt is read. Driven with SnapKV."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune.bench.measure import Started
from vtprune.bench.rivals.base import Inputs, Rival, visual_tokens

__all__ = ["RIVAL"]


def _import() -> ModuleType:
    """kvpress, with transformers as it was: importing it wraps every attention function of the process.

    The wrappers serve presses that drop other numbers of rows in each head, which is not timed here; left in place,
    the unpruned model would run through them too.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("kvpress")
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                # an entry of this table hides the one that is shared by the library, which then shows again
                del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function


def _refuses(model: Any, inputs: Inputs) -> str | None:
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return "the model has sliding windows, whose cache it does not compress"
    return None


@contextmanager
def _attach(model: Any, inputs: Inputs, keep: int) -> Iterator[Callable[[], Started]]:
    rows = inputs["input_ids"].shape[1]
    kept = rows - visual_tokens(model, inputs)[0] + keep
    # half a row more: it cuts off what is behind the point of rows * (1 - ratio)
    press = _import().SnapKVPress(compression_ratio=max(0.0, 1 - (kept + 0.5) / rows))
    # up to transformers 5.2 the host itself passed this to its layers, where kvpress looks for it
    position = torch.arange(rows, device=inputs["input_ids"].device)

    def prefill() -> Started:
        # in the context for the prefill alone, as its own pipeline does it
        with press(model):
            out = model(**inputs, use_cache=True, logits_to_keep=1, cache_position=position)
        return Started(out.past_key_values, out.logits[:, -1:].argmax(-1))

    # it warns at every call that it was not tested on this class; the row says so once
    logger = logging.getLogger("kvpress")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield prefill
    finally:
        logger.setLevel(level)


RIVAL = Rival(
    name="kvpress",
    requires=">=0.5.5,<0.6",
    # its metadata asks for transformers<5.3, which vtprune cannot run on
    install="pip install --no-deps 'kvpress>=0.5.5,<0.6' && pip install 'cachetools<6' datasets 'fire<0.7' requests",
    does="KV cache compression after the prefill (SnapKVPress): saves no prefill",
    budget="rows of the KV cache, text included: as many as text and kept visual tokens are",
    notes=(
        "each layer and head keeps other rows, text rows among them",
        "its authors tested it on text models, and with transformers < 5.3: cache_position is passed for it",
    ),
    flop_ratio=1.0,
    refuses=_refuses,
    attach=_attach,
)
