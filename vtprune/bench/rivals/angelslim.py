"""AngelSlim (Tencent): its token compressor prunes before the decoder. Driven with DivPrune at the decoder's input."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from vtprune.bench.measure import Started
from vtprune.bench.rivals.base import Inputs, Rival, visual_tokens

__all__ = ["RIVAL"]

_PACKAGE = "angelslim.compressor.token_compressor"
# the classes of its own that replace the model and its decoder; DivPrune captures nothing inside the tower or layers
_SERVED = {
    "llava": ("Prunable_LlavaModel", "Prunable_LlamaModel"),
    "qwen2_5_vl": ("Prunable_Qwen2_5_VLModel", "Prunable_Qwen2_5_VLTextModel"),
}


def _refuses(model: Any, inputs: Inputs) -> str | None:
    config = model.config
    if config.model_type not in _SERVED:
        return f"it serves LLaVA-1.5 and Qwen2.5-VL, not {config.model_type}"
    parts = (config.text_config.model_type, config.vision_config.model_type)
    if config.model_type == "llava" and parts != ("llama", "clip_vision_model"):
        return f"it serves LLaVA of a Llama and a CLIP tower, not of {parts[0]} and {parts[1]}"
    if len(inputs["input_ids"]) > 1:
        return f"it runs batches of 1, not of {len(inputs['input_ids'])}"
    return None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("angelslim."):
            raise
        raise ModuleNotFoundError(f"this angelslim is without {error.name}, as its wheels are") from error


@contextmanager
def _attach(model: Any, inputs: Inputs, keep: int) -> Iterator[Callable[[], Started]]:
    config = _import("base.config")
    ratio = 1 - keep / visual_tokens(model, inputs)[0]
    plan = config.TokenCompressorConfig(
        requirements=config.DataRequirements(inputs_embeds=True),
        strategies={"global": config.StrategyConfig("divprune", {"ratio": ratio})},
    )
    kind = model.config.model_type
    places = (("vl_model", "model"), ("text_model", "model.language_model"))
    mapping = [
        {"name": name, "path": path, "wrapper_module": f".models.{kind}", "wrapper_class": wrapper}
        for (name, path), wrapper in zip(places, _SERVED[kind], strict=True)
    ]
    # it prints what it wraps and what it prunes
    with redirect_stdout(io.StringIO()):
        adapter = _import("adapter").UniversalPruningAdapter(model=model, strategy_config=plan, raw_map_data=mapping)
        adapter.wrap_model()

    def prefill() -> Started:
        with redirect_stdout(io.StringIO()):
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        return Started(out.past_key_values, out.logits[:, -1:].argmax(-1))

    try:
        yield prefill
    finally:
        with redirect_stdout(io.StringIO()):
            adapter.unwrap_model()


RIVAL = Rival(
    name="angelslim",
    requires=">=0.5",
    install="git clone https://github.com/Tencent/AngelSlim, and put it in PYTHONPATH before a wheel of it",
    does="prunes at the decoder's input (DivPrune)",
    budget="visual tokens that enter the decoder",
    notes=("replaces modules of the model by classes of its own",),
    flop_ratio=None,
    refuses=_refuses,
    attach=_attach,
)
