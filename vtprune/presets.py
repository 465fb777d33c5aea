"""Random-weight LLaVA models of realistic shape, built from a config alone: speed and memory need no trained weights.

A preset is written `name` or `name:layers=8`; the option cuts the decoder's depth so that a large model fits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

__all__ = ["PRESETS", "Preset", "build_random", "preset_config", "random_inputs"]

_IMAGE_TOKEN = 3
_FIRST_WORD = 10  # ids below are special tokens, so that random text never contains one


@dataclass(frozen=True)
class Preset:
    """Shape of a LLaVA model.

    Attributes:
        summary: one line for listings.
        hidden, intermediate, layers, heads, kv_heads, vocabulary: the Llama decoder.
        image_size, patch_size: pixels; (image_size / patch_size) ** 2 visual tokens an image.
        tower_hidden, tower_intermediate, tower_blocks, tower_heads: the CLIP tower.
    """

    summary: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    image_size: int
    patch_size: int
    tower_hidden: int
    tower_intermediate: int
    tower_blocks: int
    tower_heads: int


PRESETS: dict[str, Preset] = {
    "llama-0.3b": Preset(
        "576 visual tokens, 16 layers x 1024; a small tower (4 x 256), so that the decoder dominates",
        hidden=1024,
        intermediate=2752,
        layers=16,
        heads=16,
        kv_heads=16,
        vocabulary=1024,
        image_size=336,
        patch_size=14,
        tower_hidden=256,
        tower_intermediate=1024,
        tower_blocks=4,
        tower_heads=4,
    ),
    "llava-1.5-7b": Preset(
        "the true geometry of LLaVA-1.5-7B with CLIP ViT-L/14-336; cut it with :layers=8",
        hidden=4096,
        intermediate=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        vocabulary=32064,
        image_size=336,
        patch_size=14,
        tower_hidden=1024,
        tower_intermediate=4096,
        tower_blocks=24,
        tower_heads=16,
    ),
    "mini": Preset(
        "16 visual tokens, 4 layers x 64: for tests, timings mean nothing",
        hidden=64,
        intermediate=128,
        layers=4,
        heads=4,
        kv_heads=2,
        vocabulary=128,
        image_size=32,
        patch_size=8,
        tower_hidden=32,
        tower_intermediate=64,
        tower_blocks=4,
        tower_heads=4,
    ),
}


def _parse(text: str) -> Preset:
    """`name` or `name:layers=8` -> Preset."""
    name, _, option = text.partition(":")
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    preset = PRESETS[name]
    if not option:
        return preset
    key, _, value = option.partition("=")
    if key != "layers" or not value.isdecimal() or int(value) < 2:
        raise InputError(f"preset option must be layers=N with N >= 2, got {option!r} (in random:{text}).")
    return dataclasses.replace(preset, layers=int(value))


def preset_config(text: str) -> LlavaConfig:
    """The HF config of a preset.

    Args:
        text: what follows `random:`, such as `llama-0.3b` or `llava-1.5-7b:layers=8`.

    Raises:
        UnknownNameError: if there is no such preset.
        InputError: if the option is malformed.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    p = _parse(text)
    vision = CLIPVisionConfig(
        hidden_size=p.tower_hidden,
        intermediate_size=p.tower_intermediate,
        num_hidden_layers=p.tower_blocks,
        num_attention_heads=p.tower_heads,
        image_size=p.image_size,
        patch_size=p.patch_size,
        projection_dim=p.tower_hidden,
    )
    decoder = LlamaConfig(
        hidden_size=p.hidden,
        intermediate_size=p.intermediate,
        num_hidden_layers=p.layers,
        num_attention_heads=p.heads,
        num_key_value_heads=p.kv_heads,
        vocab_size=p.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=_IMAGE_TOKEN,
        image_seq_length=(p.image_size // p.patch_size) ** 2,
    )


def build_random(
    text: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
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
    from transformers import LlavaForConditionalGeneration

    config = preset_config(text)
    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(config, **options)
    return model.to(device or "cpu").eval()  # type: ignore[arg-type]


def random_inputs(
    model: LlavaForConditionalGeneration, batch: int = 1, text_tokens: int = 64, images: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of random prompts for a preset's model: a beginning of text, the images, the rest of the text.

    Args:
        model: what `build_random` returned.
        batch: samples, each with other text and pixels.
        text_tokens: tokens a sample that are not visual, the beginning-of-sequence token included.
        images: images a sample.
        seed: of text and pixels.

    Returns:
        `input_ids` and `attention_mask` [batch, text_tokens + images * V], `pixel_values`
        [batch * images, 3, height, width].

    Raises:
        InputError: if a number is below 1 (`text_tokens` below 2).
    """
    import torch

    if batch < 1 or images < 1 or text_tokens < 2:
        raise InputError(
            f"batch and images must be >= 1 and text_tokens >= 2, got {batch=}, {images=}, {text_tokens=}."
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(_FIRST_WORD, config.text_config.vocab_size, (batch, text_tokens - 1), generator=generator)
    head = words.shape[1] // 2
    size = config.vision_config.image_size
    visual = torch.full((batch, images * config.image_seq_length), config.image_token_id)
    ids = torch.cat([torch.ones(batch, 1, dtype=torch.long), words[:, :head], visual, words[:, head:]], dim=1)
    pixels = torch.randn(batch * images, 3, size, size, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
