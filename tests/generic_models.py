"""Cases of models that no family names: the generic family serves them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from family_models import CLIP, IMAGE, PAD, TEXT, VIDEO, Case, case, noise

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
}
GENERIC = ("aria", "emu3", "idefics2", "perception_lm")  # through every contract test


class _Fixed(Case):
    """All images are 32 x 32 pixels and give 16 tokens; `sizes` are not read."""

    sizes = (None, None, None)

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        return {"pixel_values": torch.stack([noise(3, 32, 32, seed=seed) for _, _, seed in media])}, [16] * len(media)


class VipLlava(_Fixed):
    """Features of two layers of the tower."""

    name, model_class = "vipllava", "VipLlavaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.VipLlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP).to_dict(),
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_index=IMAGE,
            vision_feature_layers=[-2, -3],
        )


class Ovis2(_Fixed):
    """Features are words of a visual vocabulary; Qwen3 decoder."""

    name, model_class = "ovis2", "Ovis2ForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Ovis2Config(
            vision_config={
                **TOWER,
                "patch_size": 4,
                "hidden_stride": 2,
                "vocab_size": 40,
            },
            text_config=transformers.Qwen3Config(**TEXT, head_dim=16).to_dict(),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[91, 92, 93, 94, 95],
            hidden_size=TEXT["hidden_size"],
            vocab_size=TEXT["vocab_size"],
        )


@case
class Aria(_Fixed):
    """A decoder of experts; 16 learnt queries an image."""

    name, model_class = "aria", "AriaForConditionalGeneration"

    def config(self) -> Any:
        return transformers.AriaConfig(
            vision_config={
                "model_type": "idefics3_vision",
                **TOWER,
                "patch_size": 8,
            },
            text_config=transformers.AriaTextConfig(**{**TEXT, "intermediate_size": 32}).to_dict(),
            projector_patch_to_query_dict={16: 16},
            image_token_index=IMAGE,
        )


@case
class PerceptionLM(_Fixed):
    """Videos are a number of frames and have a placeholder of their own."""

    name, model_class = "perception_lm", "PerceptionLMForConditionalGeneration"
    videos = (3, 2)

    def config(self) -> Any:
        # the real tower comes from timm; any tower serves whose width the projector finds here
        vision = transformers.CLIPVisionConfig(**CLIP, model_args={"embed_dim": CLIP["hidden_size"]})
        return transformers.PerceptionLMConfig(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            projector_pooling_ratio=1,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        inputs: dict[str, Any] = {}
        pictures = [noise(1, 3, 32, 32, seed=seed) for kind, _, seed in media if kind == "image"]
        films = [noise(size, 3, 32, 32, seed=seed) for kind, size, seed in media if kind == "video"]
        if pictures:
            inputs["pixel_values"] = torch.stack(pictures)
        if films:
            inputs["pixel_values_videos"] = torch.stack(films)
        return inputs, [16 if kind == "image" else 16 * size for kind, size, _ in media]


@case
class Emu3(Case):
    """Images of 8 x 8 pixels become words of the vocabulary, with a word behind each row: 4 x 5 tokens."""

    name, model_class = "emu3", "Emu3ForConditionalGeneration"
    sizes = (None, None, None)

    def config(self) -> Any:
        words = {f"<|visual token {i:06}|>": 60 + i for i in range(16)}
        return transformers.Emu3Config(
            vq_config={
                "codebook_size": 16,
                "embed_dim": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
                "temporal_downsample_factor": 1,
            },
            text_config={**TEXT, "attention_dropout": 0.0},
            vocabulary_map={**words, "<image>": IMAGE, "<|extra_200|>": 80},
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        pixels = torch.stack([noise(3, 8, 8, seed=seed) for _, _, seed in media])
        return {"pixel_values": pixels, "image_sizes": torch.full((len(media), 2), 8)}, [20] * len(media)


@case
class Idefics2(_Fixed):
    """16 learnt queries an image; samples are padded with empty images."""

    name, model_class = "idefics2", "Idefics2ForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Idefics2Config(
            vision_config={
                **TOWER,
                "patch_size": 8,
            },
            perceiver_config={
                "hidden_size": TEXT["hidden_size"],
                "resampler_n_latents": 16,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            text_config=transformers.MistralConfig(**TEXT, sliding_window=None).to_dict(),
            image_token_id=IMAGE,
            pad_token_id=PAD,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        pixels = torch.zeros(len(rows), max(rows), 3, 32, 32)
        waiting = [seed for _, _, seed in media]
        for b, number in enumerate(rows):
            for i in range(number):
                pixels[b, i] = noise(3, 32, 32, seed=waiting.pop(0))
        return {"pixel_values": pixels}, [16] * len(media)


MORE = (Ovis2(), VipLlava())  # through the masked oracle
