"""Tiny random models of the real HF classes, and prompts for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE, PAD, VOCAB = 99, 0, 100
SIDE = 4  # patches along one side: 16 visual tokens an image
TOKENS = SIDE * SIDE
LAYERS = 4


def config(tower: str = "clip", decoder: str = "llama") -> LlavaConfig:
    """A LLaVA with 16 visual tokens, 4 decoder layers, 7 tower blocks, grouped keys."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "image_size": 8 * SIDE,
        "patch_size": 8,
    }
    vision = CLIPVisionConfig(**shape) if tower == "clip" else SiglipVisionConfig(**shape)
    text_shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    text = MistralConfig(**text_shape, sliding_window=None) if decoder == "mistral" else kinds[decoder](**text_shape)
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        image_seq_length=TOKENS,
    )


@lru_cache
def _weights(tower: str, decoder: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(tower, decoder))
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in model.state_dict().items():
        # larger than HF's init, so that attention is far from uniform and every token matters
        scale = 0.12 if value.ndim > 1 else 0.02
        noise = torch.randn(value.shape, generator=generator) * scale
        state[name] = value + noise if value.is_floating_point() else value
    return state


def llava(attention: str = "sdpa", tower: str = "clip", decoder: str = "llama") -> LlavaForConditionalGeneration:
    """A fresh random model in eval mode, the same weights every time."""
    model = LlavaForConditionalGeneration._from_config(
        copy.deepcopy(config(tower, decoder)), attn_implementation=attention
    )
    model.load_state_dict(_weights(tower, decoder))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]  # a random model would write image placeholders
    return model.eval()


@dataclass(frozen=True)
class Row:
    """One prompt: text before, between and after its images."""

    images: int = 1
    before: int = 3
    after: int = 5
    seed: int = 0

    def ids(self) -> list[int]:
        generator = torch.Generator().manual_seed(100 + self.seed)
        text = torch.randint(3, 98, (200,), generator=generator).tolist()
        ids = text[: self.before]
        for i in range(self.images):
            ids += [IMAGE] * TOKENS + text[50 + 2 * i : 52 + 2 * i]
        return ids + text[100 : 100 + self.after]

    def pixels(self) -> Tensor:
        generator = torch.Generator().manual_seed(500 + self.seed)
        return torch.randn(self.images, 3, 8 * SIDE, 8 * SIDE, generator=generator)


def batch(*rows: Row, left: bool = True) -> dict[str, Tensor]:
    """Padded inputs of several prompts."""
    lists = [row.ids() for row in rows]
    width = max(len(ids) for ids in lists)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, one in enumerate(lists):
        span = slice(width - len(one), width) if left else slice(0, len(one))
        ids[b, span], mask[b, span] = torch.tensor(one), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    pixels = [row.pixels() for row in rows if row.images]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    return inputs
