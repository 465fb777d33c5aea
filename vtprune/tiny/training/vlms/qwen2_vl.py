"""The tiny Qwen2-VL: tower without CLS, 2x2 merger, M-RoPE; it starts from the shipped tiny LLaVA."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtprune.tiny import vocabulary
from vtprune.tiny.training.vlms.base import (
    PIXEL_MEAN,
    PIXEL_STD,
    TEXT,
    VISION_HEADS,
    VISION_LAYERS,
    VISION_WIDTH,
    WIDTH,
    Encoded,
    TokenGrid,
    Vlm,
)
from vtprune.tiny.training.vlms.llava import NEIGHBOURS
from vtprune.tiny.training.vlms.tokenizer import build_tokenizer, chat_template
from vtprune.tiny.training.vlms.warm import adopt_decoder, adopt_into_qwen_tower
from vtprune.tiny.vocabulary import PATCH_SIZE, PREFIX

_SIDE, _PIXELS, _MERGE = 9, 144, 2
_START, _END, _VIDEO = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
_START_ID = len(vocabulary.WORDS)
_NEIGHBOUR_GAIN = 7.0
# low, so that a picture's 9 columns turn the slowest pair of the column axis by a tenth of a radian and more
_THETA, _SECTIONS = 100.0, [4, 8, 8]
_HEAD = VISION_WIDTH // VISION_HEADS


class Qwen2VL(Vlm):
    """`Qwen2VLForConditionalGeneration`: at least 144 px, patch 8, 2x2 patches a token, 81 visual tokens a scene."""

    name = "qwen2_vl"
    title = "tiny Qwen2-VL"
    grid = TokenGrid(pixels=_PIXELS, side=_SIDE, merge=_MERGE, after=(_START_ID + 1,))
    before = (*PREFIX, _START_ID)
    image_word = "<|image_pad|>"
    extra_words = (_START, _END, _VIDEO)
    places_from_rotary = True
    query_name = "mean-query attention"
    vision = ("model.visual.patch_embed", "model.visual.blocks", "model.visual.merger.ln_q")
    projector = ("model.visual.merger.mlp",)

    def __init__(self) -> None:
        super().__init__()
        self._run_block: Callable[..., torch.Tensor] = block_forward

    def compile_layers(self) -> None:
        """See `Vlm.compile_layers`."""
        self._run_block = torch.compile(block_forward, dynamic=False)
        for layer in self.decoder.layers:
            layer.compile(dynamic=False)

    def build(self) -> Qwen2VLForConditionalGeneration:
        """See `Vlm.build`."""
        vision = {
            "depth": VISION_LAYERS,
            "embed_dim": VISION_WIDTH,
            "hidden_size": WIDTH,
            "mlp_ratio": 4,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
        }
        text = {
            "vocab_size": len(self.words()),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": _THETA, "mrope_section": _SECTIONS},
            **TEXT,
        }
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                vision_config=vision,
                text_config=text,
                image_token_id=vocabulary.IMAGE,
                video_token_id=_START_ID + 2,
                vision_start_token_id=_START_ID,
                vision_end_token_id=_START_ID + 1,
                tie_word_embeddings=False,
            )
        )
        adopt_decoder(model)
        adopt_into_qwen_tower(model.model.visual, fresh=len(NEIGHBOURS))
        with torch.no_grad():
            _init_neighbour_heads(model.model.visual)
        return model

    def build_processor(self) -> Qwen2VLProcessor:
        """See `Vlm.build_processor`."""
        template = chat_template(f"{_START}{self.image_word}{_END}", f"{_START}{_VIDEO}{_END}")
        tokenizer = build_tokenizer(self.words(), self.image_word, (_START, _END, _VIDEO))
        tokenizer.chat_template = template
        shared: dict[str, Any] = {
            "patch_size": PATCH_SIZE,
            "merge_size": _MERGE,
            "temporal_patch_size": 2,
            # scenes and easy-VQA pictures are enlarged to this, so that an object spans several tokens
            "size": {"shortest_edge": _PIXELS**2, "longest_edge": 16 * _PIXELS**2},
            "resample": 3,
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
        }
        return Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(**shared),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**shared),
            chat_template=template,
        )

    def vision_layers(self) -> nn.ModuleList:
        """See `Vlm.vision_layers`."""
        return self.hf.model.visual.blocks

    def _patches(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, C * 2 * patch * patch] flat patches, the four of a token side by side, and their places [2, N]."""
        pixels, patch, side = self.pixels(images), PATCH_SIZE, self.grid.side
        tiles = pixels.view(len(pixels), 3, side, _MERGE, patch, side, _MERGE, patch)
        tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(pixels), -1, 3, 1, patch * patch)
        grid = torch.arange(side * _MERGE).expand(side * _MERGE, -1)
        ordered = [axis.reshape(side, _MERGE, side, _MERGE).permute(0, 2, 1, 3).flatten() for axis in (grid.T, grid)]
        # a still picture is two equal frames
        return tiles.expand(-1, -1, -1, 2, -1).flatten(2), torch.stack(ordered)

    def _run(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Hidden states [B, N, D] behind the last block and before it, and the rotary angles.

        The host loops over images; pictures of one size are one batch.
        """
        tower, (patches, places) = self.hf.model.visual, self._patches(images)
        kernel = tower.patch_embed.proj.weight.flatten(1)
        hidden = functional.linear(patches, kernel)
        angles = rotary_angles(places)
        before = hidden
        for block in tower.blocks:
            before, hidden = hidden, self._run_block(block, hidden, *angles)
        return hidden, before, angles

    def encode(self, images: np.ndarray) -> Encoded:
        """See `Vlm.encode`."""
        hidden, _, _ = self._run(images)
        merger = self.hf.model.visual.merger
        return Encoded(merger.ln_q(hidden).unflatten(1, (-1, _MERGE**2)).flatten(2), hidden.mean(1))

    def project(self, cells: torch.Tensor) -> torch.Tensor:
        """See `Vlm.project`."""
        return self.hf.model.visual.merger.mlp(cells)

    def tower_attention(self, images: np.ndarray) -> torch.Tensor:
        """See `Vlm.tower_attention`."""
        _, before, angles = self._run(images)
        block = self.hf.model.visual.blocks[-1]
        query, key, _ = _query_key_value(block, before, *angles)
        weights = (query.mean(2, keepdim=True) @ key.transpose(2, 3) * _HEAD**-0.5).softmax(-1)
        return weights.mean((1, 2)).unflatten(1, (-1, _MERGE**2)).sum(-1)

    @property
    def text_start(self) -> int:
        """See `Vlm.text_start`; a picture takes as many positions as its longer side has tokens."""
        return len(self.before) + self.grid.side

    def visual_positions(self, index: torch.Tensor) -> torch.Tensor:
        """See `Vlm.visual_positions`: time, row, column."""
        side = self.grid.side
        return len(self.before) + torch.stack([torch.zeros_like(index), index // side, index % side])


def rotary_angles(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [N, head width] of patches at (row, column) `places` [2, N]: half the pairs for each axis."""
    count = _HEAD // 4
    frequencies = 10000.0 ** (-torch.arange(count) / count)
    turns = torch.cat([axis[:, None] * frequencies for axis in places], 1).repeat(1, 2)
    return turns.cos(), turns.sin()


def _query_key_value(
    block: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size, length, _ = hidden.shape
    sides = block.attn.qkv(block.norm1(hidden)).view(size, length, 3, VISION_HEADS, _HEAD)
    query, key, value = sides.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = apply_rotary_pos_emb(query, key, cosine[None], sine[None])
    return query, key, value


def block_forward(block: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """One tower block on [B, N, D]."""
    query, key, value = _query_key_value(block, hidden, cosine, sine)
    weights = (query @ key.transpose(2, 3) * _HEAD**-0.5).softmax(-1)
    hidden = hidden + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.norm2(hidden))


def _init_neighbour_heads(tower: Any) -> None:
    """Heads of the first two layers start by looking at neighbours, as in the tiny LLaVA.

    Rotary attention to a fixed offset needs constant queries and keys: both come from the biases.
    """
    count = _HEAD // 4
    for layer, offsets in enumerate(NEIGHBOURS):
        bias = tower.blocks[layer].attn.qkv.bias.view(3, VISION_HEADS, _HEAD)
        for head, offset in enumerate(offsets):
            for axis, delta in enumerate(offset):
                # the two fastest pairs of each axis
                for index in range(2):
                    pair, turn = axis * count + index, delta * 10000.0 ** (-index / count)
                    bias[0, head, pair] = _NEIGHBOUR_GAIN
                    bias[1, head, pair] = _NEIGHBOUR_GAIN * math.cos(turn)
                    bias[1, head, pair + _HEAD // 2] = -_NEIGHBOUR_GAIN * math.sin(turn)
