"""The tiny LLaVA: CLIP tower with CLS, one token a patch, Llama decoder; trained from random weights."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vtprune.tiny import vocabulary
from vtprune.tiny.training.vlms.base import (
    HEADS,
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
from vtprune.tiny.training.vlms.tokenizer import build_tokenizer, chat_template
from vtprune.tiny.vocabulary import GRID, IMAGE_SIZE, PATCH_SIZE, VISUAL_TOKENS

_POSITION_AMPLITUDE = 0.5
_NEIGHBOUR_GAIN = 4.2
# the residual stream starts large against what each layer adds: with 0.5 / 0.3 / 0.2 the tokens were drowned by layer 4
# and deep look-ups found the right object but not its colour (dev, 500 steps)
_WORD_SPREAD, _RESIDUAL_GAIN = 1.2, 0.1
# offsets (down, right) at which the heads of the first two tower layers start to look
NEIGHBOURS = (((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1)))


class Llava(Vlm):
    """`LlavaForConditionalGeneration`: 128 px, patch 8, 256 visual tokens, 12 decoder layers."""

    name = "llava"
    title = "tiny LLaVA"
    grid = TokenGrid(pixels=IMAGE_SIZE, side=GRID, merge=1)
    stored_in_int8 = False
    warm_start = False

    def build(self) -> LlavaForConditionalGeneration:
        """See `Vlm.build`.

        On a CPU, compiled, plain attention is the faster one for the ViT and fused attention for the decoder.
        """
        model = LlavaForConditionalGeneration(_config())
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        with torch.no_grad():
            _init_vision_positions(model)
            _init_neighbour_heads(model)
            for name, weight in model.named_parameters():
                if "vision_tower" not in name and weight.ndim > 1:
                    _init_matrix(name, weight)
        return model

    def build_processor(self) -> LlavaProcessor:
        """See `Vlm.build_processor`."""
        template = chat_template(self.image_word)
        tokenizer = build_tokenizer(self.words(), self.image_word)
        tokenizer.chat_template = template
        images = CLIPImageProcessor(
            do_resize=True,
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            resample=2,
            do_center_crop=False,
            do_rescale=True,
            do_normalize=True,
            image_mean=[PIXEL_MEAN] * 3,
            image_std=[PIXEL_STD] * 3,
            do_convert_rgb=True,
        )
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=self.image_word,
            chat_template=template,
        )

    def vision_layers(self) -> nn.ModuleList:
        """See `Vlm.vision_layers`."""
        return _vision_layers(self.hf)

    def encode(self, images: np.ndarray) -> Encoded:
        """See `Vlm.encode`."""
        output = self.hf.model.vision_tower(self.pixels(images), return_dict=True).last_hidden_state
        return Encoded(output[:, 1:], output[:, 0])

    def project(self, cells: torch.Tensor) -> torch.Tensor:
        """See `Vlm.project`."""
        return self.hf.model.multi_modal_projector(cells)

    def tower_attention(self, images: np.ndarray) -> torch.Tensor:
        """See `Vlm.tower_attention`."""
        # a model fresh from its files runs fused attention, which does not hand out its weights
        self.hf.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        output = self.hf.model.vision_tower(self.pixels(images), output_attentions=True, return_dict=True)
        return output.attentions[-1][:, :, 0, 1:].mean(1)

    def scale_projector(self, cells: torch.Tensor) -> None:
        """Folds mean and spread of the tower's output into the first matrix, so that it starts from unit-size input."""
        projector, mean = self.hf.model.multi_modal_projector, cells.mean((0, 1))
        with torch.no_grad():
            projector.linear_1.weight /= (cells - mean).std()
            projector.linear_1.bias.copy_(-(projector.linear_1.weight @ mean))


def _config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary.WORDS),
        head_dim=WIDTH // HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **TEXT,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


def _init_matrix(name: str, weight: torch.Tensor) -> None:
    if "embed_tokens" in name:
        weight.normal_(0, _WORD_SPREAD)
        weight[vocabulary.PAD] = 0
    elif "lm_head" in name:
        weight.normal_(0, 0.02)
    else:
        into_residual = "o_proj" in name or "down_proj" in name
        weight.normal_(0, weight.shape[1] ** -0.5 * (_RESIDUAL_GAIN if into_residual else 1))


def _vision_layers(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    tower = model.model.vision_tower
    return (tower if hasattr(tower, "encoder") else tower.vision_model).encoder.layers


def _frequencies() -> torch.Tensor:
    count = VISION_WIDTH // 4
    return torch.exp(-math.log(60.0) * torch.arange(count) / count) * 1.5


def _init_vision_positions(model: LlavaForConditionalGeneration) -> None:
    """Learned CLIP positions start as a 2-D sine-cosine table: [sin y, sin x, cos y, cos x]."""
    table = next(w for name, w in model.model.vision_tower.named_parameters() if "position_embedding" in name)
    y, x = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * _frequencies() for axis in (y, x)], 1)
    table[1:] = torch.cat([angles.sin(), angles.cos()], 1) * _POSITION_AMPLITUDE
    table[0] = torch.randn(VISION_WIDTH) * _POSITION_AMPLITUDE


def _init_neighbour_heads(model: LlavaForConditionalGeneration) -> None:
    """Heads of the first two ViT layers start by looking at the 4 direct, then the 4 diagonal neighbours.

    A patch of 8 px is smaller than a digit stroke pattern; without this start the patch labels need several times
    as many steps. Attention to a fixed offset is linear in the sine-cosine table.
    """
    head_width, quarter = VISION_WIDTH // VISION_HEADS, VISION_WIDTH // 4
    chosen = range(0, 16, 2)
    frequencies = _frequencies()
    for layer, offsets in enumerate(NEIGHBOURS):
        attention = _vision_layers(model)[layer].self_attn
        for head, offset in enumerate(offsets):
            rows = slice(head * head_width, (head + 1) * head_width)
            query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
            row = 0
            for axis, delta in enumerate(offset):
                for index in chosen:
                    sine, cosine = axis * quarter + index, 2 * quarter + axis * quarter + index
                    turn = delta * float(frequencies[index])
                    across, along = math.cos(turn) * _NEIGHBOUR_GAIN, math.sin(turn) * _NEIGHBOUR_GAIN
                    key[row, sine] += _NEIGHBOUR_GAIN
                    key[row + 1, cosine] += _NEIGHBOUR_GAIN
                    query[row, sine] += across
                    query[row, cosine] += along
                    query[row + 1, cosine] += across
                    query[row + 1, sine] -= along
                    row += 2
