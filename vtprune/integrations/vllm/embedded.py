"""A checkpoint folder that vLLM can serve, from any model that `vtprune.load_model` knows. No vLLM here.

vLLM's attention on CPUs takes heads of certain widths only, and those of the embedded models are 40 wide. `widened`
gives the same model with heads of 64: all that is added is zero, and RoPE's base, the norms and the queries are scaled
so that every activation is what it was, up to rounding.

Axes: V words, D width of the decoder, H query or key heads, d their width; a prime marks the wider model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.loading import load_model
from vtprune.tiny import tiny_folder

__all__ = ["export", "widened"]

# widths of heads that vLLM's CPU attention has kernels for
_LEGAL = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def export(spec: str, folder: Path) -> Path:
    """Save a model with its processor as vLLM takes it, with wider heads if need be.

    Args:
        spec: as for `vtprune.loading.load_model`.
        folder: where to.

    Returns:
        the folder.

    Raises:
        InputError: if the model has no processor, or heads that cannot be widened.
    """
    model, processor = load_model(spec, dtype="float32")
    if processor is None:
        processor = _borrowed(model, spec)
    widened(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _borrowed(model: Any, spec: str) -> Any:
    """The processor of `tiny:llava` for a LLaVA that has none: pictures in its size, words within its vocabulary."""
    config = model.config
    if config.model_type != "llava":
        raise InputError(
            f"{spec!r} has no processor, which vLLM needs; pass random:llama-0.3b or another LLaVA preset, tiny:llava, "
            "a folder or a hub id."
        )
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_folder("llava"))
    side = config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.patch_size = config.vision_config.patch_size
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise InputError(f"{spec!r} knows fewer words than the {len(processor.tokenizer)} of the borrowed tokenizer.")
    return processor


def widened(model: Any) -> Any:
    """The same model with heads of a width that vLLM serves on CPUs; `model` itself if they are.

    Raises:
        InputError: if the heads are wider than every legal width, or do not fill the decoder's width.
    """
    text = model.config.text_config
    heads = text.num_attention_heads
    wide = getattr(text, "head_dim", None) or text.hidden_size // heads
    if wide in _LEGAL:
        return model
    new = next((n for n in _LEGAL if n > wide), 0)
    if not new or heads * wide != text.hidden_size:
        raise InputError(
            f"heads of width {wide} in a decoder of {text.hidden_size} cannot be widened for vLLM on CPUs."
        )
    config = copy.deepcopy(model.config)
    _widen_config(config, wide, new)
    larger = type(model)._from_config(config)
    shapes = {name: value.shape for name, value in larger.state_dict().items()}
    larger.load_state_dict(
        {name: _padded(_grown(name, value, wide, new), shapes[name]) for name, value in model.state_dict().items()}
    )
    larger.generation_config = copy.deepcopy(model.generation_config)
    return larger.eval()


def _widen_config(config: Any, wide: int, new: int) -> None:
    text, factor = config.text_config, new / wide
    before = text.hidden_size
    text.hidden_size = text.num_attention_heads * new
    text.head_dim = new
    # the mean square runs over more channels, the added ones zero
    text.rms_norm_eps /= factor
    rope = dict(text.rope_parameters)
    # frequency i is theta ** (-2 i / d)
    rope["rope_theta"] = rope["rope_theta"] ** factor
    if "mrope_section" in rope:
        *first, last = rope["mrope_section"]
        rope["mrope_section"] = [*first, last + (new - wide) // 2]
    text.rope_parameters = rope
    # Qwen names the width of the merger's output in the tower's config
    for name in ("hidden_size", "out_hidden_size"):
        if config.model_type.startswith("qwen2") and getattr(config.vision_config, name, None) == before:
            setattr(config.vision_config, name, text.hidden_size)


def _grown(name: str, value: Tensor, wide: int, new: int) -> Tensor:
    """A tensor of the state dict with wider heads, and scaled as the wider model needs it."""
    if "language_model" not in name:
        return value
    part = name.rsplit(".", 2)[-2]
    if part == "q_proj":
        # logits are divided by the root of the width
        return _halves(value, wide, new) * (new / wide) ** 0.5
    if part == "k_proj":
        return _halves(value, wide, new)
    if part == "v_proj":
        return _first(value, wide, new)
    if part == "o_proj":
        return _first(value.T, wide, new).T
    return value * (wide / new) ** 0.5 if "norm" in part else value


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    larger = value.new_zeros(shape)
    larger[tuple(slice(n) for n in value.shape)] = value
    return larger


def _by_head(place: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, int, int], Tensor]:
    def grow(value: Tensor, wide: int, new: int) -> Tensor:
        heads = value.unflatten(0, (-1, wide))
        grown = value.new_zeros(heads.shape[0], new, *value.shape[1:])
        place(heads, grown)
        return grown.flatten(0, 1)

    return grow


def _place_first(heads: Tensor, grown: Tensor) -> None:
    grown[:, : heads.shape[1]] = heads


def _place_halves(heads: Tensor, grown: Tensor) -> None:
    # RoPE turns channel i with channel i + d / 2
    old, new = heads.shape[1] // 2, grown.shape[1] // 2
    grown[:, :old] = heads[:, :old]
    grown[:, new : new + old] = heads[:, old:]


_first = _by_head(_place_first)
_halves = _by_head(_place_halves)
