"""Tiny random models of every family and prompts for them, built without a processor."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

# what the installed transformers does; 5.16 is the oldest supported
HOST = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HOST_ENCODES_FIRST = HOST >= (5, 18)  # generate() encodes images before it calls the model
HOST_KEEPS_BEAM_ORDER = HOST >= (5, 19)  # of several images of one prompt

IMAGE, VIDEO, PAD, VOCAB, LAYERS = 99, 98, 0, 100, 4

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def noise(*shape: int, seed: int) -> Tensor:
    """Reproducible normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Row:
    """One prompt: text before, its images and videos, text after; `media` are (kind, size) in the family's own unit."""

    media: tuple[tuple[str, Any], ...]
    before: int = 3
    after: int = 5
    seed: int = 0


class Case(ABC):
    """One family: a tiny model, sizes of pictures worth testing, and how a prompt becomes the model's inputs."""

    name: ClassVar[str]
    model_class: ClassVar[str]
    sizes: ClassVar[tuple[Any, ...]]
    videos: ClassVar[tuple[Any, ...]] = ()
    mixes: ClassVar[bool] = True  # images and videos may come in one call
    beams_keep_order: ClassVar[bool] = HOST_KEEPS_BEAM_ORDER
    turns: ClassVar[bool] = True  # the host itself can go on over a cache
    tower_sizes: ClassVar[tuple[Any, ...]] = ()  # where not all `sizes` allow cuts in the tower

    @abstractmethod
    def config(self) -> Any:
        """A new config."""

    @abstractmethod
    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        """(model inputs, tokens of each medium) for (kind, size, seed) in order; `rows`: media of each sample."""

    def model(self, attention: str = "sdpa") -> Any:
        """A fresh random model in eval mode, the same weights every time."""
        cls = getattr(transformers, self.model_class)
        model = cls._from_config(copy.deepcopy(self.config()), attn_implementation=attention)
        model.load_state_dict(_weights(self))
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        model.generation_config.suppress_tokens = [IMAGE, VIDEO]  # a random model would write placeholders
        return model.eval()

    def batch(self, *rows: Row, left: bool = True) -> dict[str, Any]:
        """Padded inputs of several prompts."""
        media = [(kind, size, 10 * row.seed + i) for row in rows for i, (kind, size) in enumerate(row.media)]
        inputs, tokens = self.encode(media, [len(row.media) for row in rows])
        lists, at = [], 0
        for row in rows:
            words = torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(row.seed)).tolist()
            ids = words[: row.before]
            for i, (kind, _) in enumerate(row.media):
                for run in self.runs(kind, tokens[at]):
                    start, end = self.marks(kind)
                    ids += [*start, *[self.placeholder(kind)] * run, *end, *words[50 + 2 * i : 52 + 2 * i]]
                at += 1
            lists.append(ids + words[100 : 100 + row.after])
        width = max(map(len, lists))
        ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
        for b, one in enumerate(lists):
            span = slice(width - len(one), width) if left else slice(0, len(one))
            ids[b, span], mask[b, span] = torch.tensor(one), 1
        return {"input_ids": ids, "attention_mask": mask, **self.extra(ids), **inputs}

    def placeholder(self, kind: str) -> int:
        """The token that stands for a patch."""
        return IMAGE if kind == "image" else VIDEO

    def runs(self, kind: str, tokens: int) -> list[int]:
        """Placeholders of one medium, cut where text stands between them."""
        return [tokens]

    def marks(self, kind: str) -> tuple[list[int], list[int]]:
        """Tokens before and behind the placeholders, where the host looks for them."""
        return [], []

    def extra(self, ids: Tensor) -> dict[str, Tensor]:
        """Inputs derived from the token ids."""
        return {}

    def visual(self, ids: Tensor) -> Tensor:
        """[B, N] True at placeholders."""
        return (ids == IMAGE) | (ids == VIDEO)


CASES: dict[str, Case] = {}


def case(cls: type[Case]) -> type[Case]:
    """Files a case under its name."""
    CASES[cls.name] = cls()
    return cls


@lru_cache
def _weights(chosen: Case) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = getattr(transformers, chosen.model_class)(chosen.config())
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, value in model.state_dict().items():
        # larger than HF's init, so that attention is far from uniform and every token matters
        scale = 0.12 if value.ndim > 1 else 0.02
        state[key] = value
        if value.is_floating_point():
            state[key] = value + torch.randn(value.shape, generator=generator) * scale
    return state


@case
class Llava(Case):
    """All images have 4 x 4 patches; `sizes` are not read."""

    name, model_class = "llava", "LlavaForConditionalGeneration"
    sizes = (None, None, None)

    def config(self) -> Any:
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**{**CLIP, "num_hidden_layers": 7}).to_dict(),
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=16,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        return {"pixel_values": torch.stack([noise(3, 32, 32, seed=seed) for _, _, seed in media])}, [16] * len(media)


@case
class VideoLlava(Llava):
    """Images as in LLaVA; videos are a number of frames, each CLS and 4 x 4 patches."""

    name, model_class = "video_llava", "VideoLlavaForConditionalGeneration"
    videos = (3, 2)

    def config(self) -> Any:
        return transformers.VideoLlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP).to_dict(),
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        inputs, _ = super().encode([m for m in media if m[0] == "image"], rows)
        inputs = {f"{name}_images": pixels for name, pixels in inputs.items()}  # as the processor names them
        films = [noise(m[1], 3, 32, 32, seed=m[2]) for m in media if m[0] == "video"]
        if films:
            inputs["pixel_values_videos"] = torch.stack(films)
        return inputs, [16 if kind == "image" else 17 * size for kind, size, _ in media]


@case
class LlavaNext(Case):
    """Sizes are (height, width) in pixels; 4 x 4 patches a crop."""

    name, model_class = "llava_next", "LlavaNextForConditionalGeneration"
    sizes = ((64, 64), (40, 70), (30, 100))

    def config(self) -> Any:
        return transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP).to_dict(),
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]],
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        sizes = [size for _, size, _ in media]
        crops = [self._crops(size) for size in sizes]
        pixels = torch.zeros(len(media), max(crops), 3, 32, 32)
        for i, (count, (_, _, seed)) in enumerate(zip(crops, media, strict=True)):
            pixels[i, :count] = noise(count, 3, 32, 32, seed=seed)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        with torch.no_grad():
            features = _plain(self.name).get_image_features(**inputs).pooler_output
        return inputs, [len(f) for f in features]

    def _crops(self, size: tuple[int, int]) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(list(size), self.config().image_grid_pinpoints, 32)


@lru_cache
def _plain(name: str) -> Any:
    """A model that is never pruned, to ask the host how many features a picture has."""
    return CASES[name].model()


@case
class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT, but several images of a prompt stay whole; videos are a number of frames."""

    name, model_class = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
    tower_sizes = ((32, 64), (20, 96), (64, 16))
    videos = (3, 2)

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**CLIP, vision_use_head=False).to_dict(),
            text_config=transformers.Qwen2Config(**TEXT).to_dict(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]],
        )

    def video_tokens(self, frames: int) -> int:
        """4 x 4 patches pooled to 2 x 2 a frame, and one newline."""
        return 4 * frames + 1

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        images = [m for m in media if m[0] == "image"]
        films = [m for m in media if m[0] == "video"]
        inputs: dict[str, Any] = {}
        tokens: dict[str, list[int]] = {"image": [], "video": []}
        host = _plain(self.name)
        if images:
            together = [n for n in rows if n] if not films else [1] * len(images)
            alone = [n == 1 for n in together for _ in range(n)]
            crops = [self._crops(m[1]) if a else 1 for m, a in zip(images, alone, strict=True)]
            pixels = torch.zeros(len(images), max(crops), 3, 32, 32)
            for i, (count, (_, _, seed)) in enumerate(zip(crops, images, strict=True)):
                pixels[i, :count] = noise(count, 3, 32, 32, seed=seed)
            inputs |= {
                "pixel_values": pixels,
                "image_sizes": torch.tensor([m[1] for m in images]),
                "batch_num_images": torch.tensor(together),
            }
            with torch.no_grad():
                tokens["image"] = [len(f) for f in host.model.get_image_features(**inputs).pooler_output]
        if films:
            inputs["pixel_values_videos"] = torch.stack([noise(m[1], 3, 32, 32, seed=m[2]) for m in films])
            tokens["video"] = [self.video_tokens(m[1]) for m in films]
        return inputs, [tokens[kind].pop(0) for kind, _, _ in media]


@case
class InternVL(Case):
    """Sizes are a number of tiles, each 8 x 8 patches shuffled to 4 x 4 tokens."""

    name, model_class = "internvl", "InternVLForConditionalGeneration"
    sizes = (1, 3, 2)

    def config(self) -> Any:
        vision = transformers.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=[32, 32],
            patch_size=[4, 4],
        )
        return transformers.InternVLConfig(
            vision_config=vision.to_dict(),
            text_config=transformers.Qwen2Config(**TEXT).to_dict(),
            image_token_id=IMAGE,
            image_seq_length=16,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        pixels = torch.cat([noise(tiles, 3, 32, 32, seed=seed) for _, tiles, seed in media])
        return {"pixel_values": pixels}, [16 * tiles for _, tiles, _ in media]


@case
class Qwen2VL(Case):
    """Sizes are (time, height, width) in patches of 4 x 4 pixels; 2 x 2 patches a token."""

    name, model_class = "qwen2_vl", "Qwen2VLForConditionalGeneration"
    sizes = ((1, 8, 8), (1, 4, 10), (1, 6, 6))
    videos = ((3, 4, 6), (2, 4, 4))

    def config(self) -> Any:
        return transformers.Qwen2VLConfig(
            vision_config={
                "depth": 5,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=96,
            vision_end_token_id=97,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        inputs: dict[str, Any] = {}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            mine = [(size, seed) for k, size, seed in media if k == kind]
            if mine:
                inputs[pixels] = torch.cat([noise(t * h * w, 96, seed=seed) for (t, h, w), seed in mine])
                inputs[grid] = torch.tensor([size for size, _ in mine])
        return inputs, [t * h * w // 4 for _, (t, h, w), _ in media]

    def marks(self, kind: str) -> tuple[list[int], list[int]]:
        return [96], [97]

    def extra(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


@case
class Qwen25VL(Qwen2VL):
    """Window attention in the tower."""

    name, model_class = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 5,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 4,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [2, 4],
            },
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=96,
            vision_end_token_id=97,
        )


@case
class LlavaNextVideo(LlavaOnevision):
    """As LLaVA-NeXT; videos are a number of frames, pooled 2 x 2."""

    name, model_class = "llava_next_video", "LlavaNextVideoForConditionalGeneration"

    def video_tokens(self, frames: int) -> int:
        return 4 * frames

    def config(self) -> Any:
        return transformers.LlavaNextVideoConfig(
            vision_config=transformers.CLIPVisionConfig(**CLIP).to_dict(),
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            spatial_pool_mode="average",
            spatial_pool_stride=2,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]],
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        # every image is cut into crops, also several of one prompt
        inputs, tokens = super().encode(media, [1] * len(media))
        inputs.pop("batch_num_images", None)
        return inputs, tokens


@case
class Mistral3(Case):
    """Sizes are (height, width) in pixels; 4 pixels a patch, 2 x 2 patches a token, a row break behind each row."""

    name, model_class = "mistral3", "Mistral3ForConditionalGeneration"
    sizes = ((32, 32), (16, 40), (24, 24))

    def config(self) -> Any:
        vision = transformers.PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=64,
            patch_size=4,
        )
        return transformers.Mistral3Config(
            vision_config=vision.to_dict(),
            text_config=transformers.MistralConfig(**TEXT, sliding_window=None).to_dict(),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            spatial_merge_size=2,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        high, wide = (max(size[axis] for _, size, _ in media) for axis in range(2))
        pixels = torch.zeros(len(media), 3, high, wide)
        for i, (_, (height, width), seed) in enumerate(media):
            pixels[i, :, :height, :width] = noise(3, height, width, seed=seed)
        sizes = [size for _, size, _ in media]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, [h * w // 64 for h, w in sizes]


@case
class Idefics3(Case):
    """Sizes are a number of crops, each 8 x 8 patches shuffled to 4 x 4 tokens."""

    name, model_class = "idefics3", "Idefics3ForConditionalGeneration"
    sizes = (1, 3, 2)
    config_class: ClassVar[str] = "Idefics3Config"

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 4,
            },
            text_config=transformers.LlamaConfig(**TEXT).to_dict(),
            image_token_id=IMAGE,
            pad_token_id=PAD,
            scale_factor=2,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        waiting = list(media)
        samples = [[waiting.pop(0) for _ in range(number)] for number in rows]
        width = max(sum(crops for _, crops, _ in sample) for sample in samples)
        pixels = torch.zeros(len(samples), width, 3, 32, 32)
        for b, sample in enumerate(samples):
            at = 0
            for _, crops, seed in sample:
                pixels[b, at : at + crops] = noise(crops, 3, 32, 32, seed=seed)
                at += crops
        return {"pixel_values": pixels}, [16 * crops for _, crops, _ in media]


@case
class SmolVLM(Idefics3):
    """SmolVLM has Idefics3's shape and its own class."""

    name, model_class, config_class = "smolvlm", "SmolVLMForConditionalGeneration", "SmolVLMConfig"


class _Timestamps(Qwen2VL):
    """Text stands before every frame of a video: all videos here have three frames."""

    videos = ((3, 4, 6), (3, 4, 4))

    def runs(self, kind: str, tokens: int) -> list[int]:
        return [tokens] if kind == "image" else [tokens // 3] * 3


@case
class Glm4v(_Timestamps):
    """GLM-4.1V; a video has the placeholder of an image and stands between its own start and end tokens."""

    name, model_class = "glm4v", "Glm4vForConditionalGeneration"
    mixes = beams_keep_order = False  # transformers 5.23 still has the old order here

    def placeholder(self, kind: str) -> int:
        return IMAGE

    def marks(self, kind: str) -> tuple[list[int], list[int]]:
        return ([94], [95]) if kind == "image" else ([96], [97])

    def batch(self, *rows: Row, left: bool = True) -> dict[str, Any]:
        inputs = super().batch(*rows, left=left)
        for b, row in enumerate(rows):
            if any(kind == "video" for kind, _ in row.media):
                inputs["mm_token_type_ids"][b] *= 2
        return inputs

    def config(self) -> Any:
        return transformers.Glm4vConfig(
            vision_config={
                "depth": 5,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 4,
                "patch_size": 4,
                "image_size": 32,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            text_config={
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 3, 3],
                    "partial_rotary_factor": 1.0,
                },
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=94,
            image_end_token_id=95,
            video_start_token_id=96,
            video_end_token_id=97,
        )


@case
class Qwen3VL(_Timestamps):
    """DeepStack: features of two tower blocks are added after the first two decoder layers."""

    name, model_class = "qwen3_vl", "Qwen3VLForConditionalGeneration"

    def config(self) -> Any:
        return transformers.Qwen3VLConfig(
            vision_config={
                "depth": 5,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 4,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [1, 3],
            },
            text_config={
                **TEXT,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=96,
            vision_end_token_id=97,
        )


SIGLIP = {**CLIP, "patch_size": 4, "vision_use_head": False}
# shorter than every prompt, so that it matters; the oldest transformers wants a sliding layer first
WINDOW = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}


@case
class Gemma3(Case):
    """All images have 8 x 8 patches pooled to 4 x 4; `sizes` are not read."""

    name, model_class = "gemma3", "Gemma3ForConditionalGeneration"
    sizes = (None, None, None)
    turns = HOST >= (5, 17)  # before, masks of sliding layers had the size of full ones

    def config(self) -> Any:
        return transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**SIGLIP).to_dict(),
            text_config=transformers.Gemma3TextConfig(
                **TEXT, **WINDOW, head_dim=16, query_pre_attn_scalar=16
            ).to_dict(),
            image_token_id=IMAGE,
            mm_tokens_per_image=16,
        )

    def encode(self, media: list[tuple[str, Any, int]], rows: list[int]) -> tuple[dict[str, Any], list[int]]:
        if not media:
            return {}, []
        return {"pixel_values": torch.stack([noise(3, 32, 32, seed=seed) for _, _, seed in media])}, [16] * len(media)

    def extra(self, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMAGE).long()}


@case
class PaliGemma(Gemma3):
    """4 x 4 patches; the whole prompt is of type 0."""

    name, model_class = "paligemma", "PaliGemmaForConditionalGeneration"
    turns = True

    def text(self) -> Any:
        return transformers.GemmaConfig(**TEXT, head_dim=16)

    def config(self) -> Any:
        return transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**{**SIGLIP, "patch_size": 8}).to_dict(),
            text_config=self.text().to_dict(),
            image_token_id=IMAGE,
            projection_dim=TEXT["hidden_size"],
        )

    def extra(self, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}


@case
class PaliGemma2(PaliGemma):
    """Gemma 2: sliding layers, soft-capped logits; eager attention only."""

    name = "paligemma2"

    def text(self) -> Any:
        return transformers.Gemma2Config(
            **TEXT, **WINDOW, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=1.0
        )

    def model(self, attention: str = "sdpa") -> Any:
        return super().model("eager")
