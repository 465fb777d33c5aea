"""Random-weight models of realistic shape, built from a config alone: speed and memory need no trained weights.

A preset is written `name` or `name:layers=8`; the option cuts the decoder's depth so that a large model fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, UnknownNameError
from vtprune.presets.shapes import InternVL, Llama, Llava, LlavaNext, Qwen25VL, Shape

if TYPE_CHECKING:
    import torch

__all__ = ["PRESETS", "build_random", "preset_config", "random_inputs"]

_FIRST_WORD = 10  # ids below are special tokens, so that random text never contains one
_VICUNA = Llama(4096, 11008, 32, 32, 32, 32064)
_SMALL = Llama(1024, 2752, 16, 16, 16, 1024)
_MINI = Llama(64, 128, 4, 4, 2, 128)

PRESETS: dict[str, Shape] = {
    "llama-0.3b": Llava(
        "576 visual tokens, 16 layers x 1024; a small tower (4 x 256), so that the decoder dominates",
        *(_SMALL, 256, 1024, 4, 4, 336, 14),
    ),
    "llava-1.5-7b": Llava(
        "LLaVA-1.5-7B: 576 visual tokens, CLIP ViT-L/14-336", *(_VICUNA, 1024, 4096, 24, 16, 336, 14)
    ),
    "llava-next-7b": LlavaNext(
        "LLaVA-NeXT-7B (Vicuna): 2928 visual tokens of a 672 x 672 image", *(_VICUNA, 1024, 4096, 24, 16, 336, 14)
    ),
    "qwen2.5-vl-3b": Qwen25VL(
        "Qwen2.5-VL-3B: 576 visual tokens of a 672 x 672 image",
        *(Llama(2048, 11008, 36, 16, 2, 151936), 1280, 3420, 32, 16, 672, 14),
    ),
    "qwen2.5-vl-7b": Qwen25VL(
        "Qwen2.5-VL-7B: 576 visual tokens of a 672 x 672 image",
        *(Llama(3584, 18944, 28, 28, 4, 152064), 1280, 3420, 32, 16, 672, 14),
    ),
    "internvl3-2b": InternVL(
        "InternVL3-2B: 1280 visual tokens of five tiles",
        *(Llama(1536, 8960, 28, 12, 2, 151674), 1024, 4096, 24, 16, 448, 14, 5),
    ),
    "mini": Llava("16 visual tokens, 4 layers x 64: for tests, timings mean nothing", *(_MINI, 32, 64, 4, 4, 32, 8)),
    "mini-next": LlavaNext("as mini, in crops", *(_MINI, 32, 64, 4, 4, 32, 8)),
    "mini-qwen2.5": Qwen25VL("as mini, with windows", *(_MINI, 32, 64, 4, 4, 64, 8, 32, (1, 3), (2, 3, 3))),
    "mini-internvl": InternVL("as mini, in tiles", *(_MINI, 32, 64, 4, 4, 64, 8, 2)),
}


def _parse(text: str) -> tuple[Shape, int | None]:
    """`name` or `name:layers=8` -> the shape, and the layers asked for."""
    name, _, option = text.partition(":")
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    if not option:
        return PRESETS[name], None
    key, _, value = option.partition("=")
    if key != "layers" or not value.isdecimal() or int(value) < 2:
        raise InputError(f"preset option must be layers=N with N >= 2, got {option!r} (in random:{text}).")
    return PRESETS[name], int(value)


def preset_config(text: str) -> Any:
    """The HF config of a preset.

    Args:
        text: what follows `random:`, such as `llama-0.3b` or `llava-1.5-7b:layers=8`.

    Raises:
        UnknownNameError: if there is no such preset.
        InputError: if the option is malformed.
    """
    shape, layers = _parse(text)
    return shape.config(layers)


def build_random(
    text: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    seed: int = 0,
) -> Any:
    """A preset's model with seeded random weights, in eval mode. The global random state is left as it was.

    Args:
        text: what follows `random:`.
        dtype: of the weights; fp32 if None.
        device: where the model goes; the CPU if None.
        attn_implementation: HF attention backend; HF's choice if None.
        seed: of the weights.

    Raises:
        UnknownNameError: if there is no such preset.
        InputError: if the option is malformed.
    """
    import torch
    import transformers

    shape, layers = _parse(text)
    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, shape.model_class)._from_config(shape.config(layers), **options)
    model.vtprune_preset = text.partition(":")[0]
    return model.to(device or "cpu").eval()


def random_inputs(
    model: Any, batch: int = 1, text_tokens: int = 64, images: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of random prompts for a preset's model: a beginning of text, the images, the rest of the text.

    Args:
        model: what `build_random` returned.
        batch: samples, each with other text and pixels.
        text_tokens: tokens a sample that are not visual, the beginning-of-sequence token and one between two images
            included.
        images: images a sample.
        seed: of text and pixels.

    Returns:
        `input_ids` and `attention_mask` [batch, text_tokens + images * V], and the pictures as the model's processor
        gives them, `pixel_values` among them.

    Raises:
        InputError: if a number is below 1, `text_tokens` is not above `images`, or the model is no preset's.
    """
    import torch

    if batch < 1 or images < 1 or text_tokens < images + 1:
        raise InputError(
            f"batch and images must be >= 1 and text_tokens > images, got {batch=}, {images=}, {text_tokens=}."
        )
    name = getattr(model, "vtprune_preset", None)
    if name is None:
        raise InputError(f"{type(model).__name__} was not made by build_random(), so its pictures are not known.")
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(_FIRST_WORD, config.text_config.vocab_size, (batch, text_tokens - 1), generator=generator)
    between, words = words[:, : images - 1], words[:, images - 1 :]
    head = words.shape[1] // 2
    pictures = PRESETS[name].pictures(batch * images, generator)
    visual = torch.full((batch, pictures.tokens), config.image_token_id)
    # a word between two images, as templates have: M-RoPE finds the images by what is between them
    parts = [torch.ones(batch, 1, dtype=torch.long), words[:, :head], visual]
    for n in range(images - 1):
        parts += [between[:, n : n + 1], visual]
    ids = torch.cat([*parts, words[:, head:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures.inputs}
    if "image_grid_thw" in inputs:
        # M-RoPE takes the kind of each token from here
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return {
        key: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for key, value in inputs.items()
    }
