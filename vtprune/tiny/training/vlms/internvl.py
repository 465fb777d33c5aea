"""The tiny InternVL: InternViT with CLS, pixel shuffle, Qwen2 decoder; it starts from the shipped tiny LLaVA."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from vtprune.tiny import vocabulary
from vtprune.tiny.training.vlms.base import (
    PIXEL_MEAN,
    PIXEL_STD,
    TEXT,
    VISION_HEADS,
    VISION_LAYERS,
    VISION_WIDTH,
    Encoded,
    TokenGrid,
    Vlm,
)
from vtprune.tiny.training.vlms.tokenizer import build_tokenizer, chat_template
from vtprune.tiny.training.vlms.warm import adopt_decoder, adopt_into_internvit
from vtprune.tiny.vocabulary import PATCH_SIZE, PREFIX

_SIDE, _PIXELS = 9, 144
_START, _END, _VIDEO = "<img>", "</img>", "<video>"
_START_ID = len(vocabulary.WORDS)


class InternVL(Vlm):
    """`InternVLForConditionalGeneration`: 144 px, patch 8, 2x2 patches a token, 81 visual tokens."""

    name = "internvl"
    title = "tiny InternVL"
    grid = TokenGrid(pixels=_PIXELS, side=_SIDE, merge=2, after=(_START_ID + 1,))
    before = (*PREFIX, _START_ID)
    image_word = "<IMG_CONTEXT>"
    extra_words = (_START, _END, _VIDEO)
    vision = ("model.vision_tower", "model.multi_modal_projector.layer_norm")
    projector = ("model.multi_modal_projector.linear",)

    def build(self) -> InternVLForConditionalGeneration:
        """See `Vlm.build`."""
        vision = InternVLVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=VISION_HEADS,
            attention_bias=True,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            image_size=_PIXELS,
            patch_size=PATCH_SIZE,
        )
        text = Qwen2Config(
            vocab_size=len(self.words()),
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            use_sliding_window=False,
            **TEXT,
        )
        model = InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=vision,
                text_config=text,
                image_token_id=vocabulary.IMAGE,
                image_seq_length=self.grid.tokens,
                tie_word_embeddings=False,
            )
        )
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        adopt_decoder(model)
        adopt_into_internvit(model.model.vision_tower, self.grid.side * self.grid.merge)
        return model

    def build_processor(self) -> InternVLProcessor:
        """See `Vlm.build_processor`."""
        template = chat_template(self.image_word, _VIDEO)
        named = {
            "start_image_token": _START,
            "end_image_token": _END,
            "context_image_token": self.image_word,
            "video_token": _VIDEO,
        }
        tokenizer = build_tokenizer(self.words(), self.image_word, (_START, _END, _VIDEO), named)
        tokenizer.chat_template = template
        shared = {
            "size": {"height": _PIXELS, "width": _PIXELS},
            "resample": 3,
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
        }
        return InternVLProcessor(
            # one crop: the scenes are square and small
            image_processor=GotOcr2ImageProcessor(min_patches=1, max_patches=1, do_convert_rgb=True, **shared),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(**shared),
            image_seq_length=self.grid.tokens,
            chat_template=template,
        )

    def vision_layers(self) -> nn.ModuleList:
        """See `Vlm.vision_layers`."""
        return self.hf.model.vision_tower.encoder.layer

    def encode(self, images: np.ndarray) -> Encoded:
        """See `Vlm.encode`."""
        output = self.hf.model.vision_tower(self.pixels(images), return_dict=True).last_hidden_state
        side = self.grid.side * self.grid.merge
        patches = output[:, 1:].unflatten(1, (side, side))
        cells = self.hf.model.pixel_shuffle(patches, scale_factor=1 / self.grid.merge).flatten(1, 2)
        return Encoded(self.hf.model.multi_modal_projector.layer_norm(cells), output[:, 0])

    def project(self, cells: torch.Tensor) -> torch.Tensor:
        """See `Vlm.project`."""
        projector = self.hf.model.multi_modal_projector
        return projector.linear_2(projector.act(projector.linear_1(cells)))

    def tower_attention(self, images: np.ndarray) -> torch.Tensor:
        """See `Vlm.tower_attention`."""
        tower = self.hf.model.vision_tower
        output = tower(self.pixels(images), output_hidden_states=True, return_dict=True)
        # the layer does not hand its attention out
        layer = tower.encoder.layer[-1]
        normed = layer.layernorm_before(output.hidden_states[-2])
        query = layer.attention.q_proj(normed[:, :1]).unflatten(-1, (VISION_HEADS, -1)).transpose(1, 2)
        key = layer.attention.k_proj(normed).unflatten(-1, (VISION_HEADS, -1)).transpose(1, 2)
        weights = (query @ key.transpose(2, 3) * layer.attention.scale).softmax(-1)
        patches = weights[:, :, 0, 1:].mean(1)
        side, merge = self.grid.side, self.grid.merge
        return patches.view(-1, side, merge, side, merge).sum((2, 4)).flatten(1)
