"""The untrained network: a LlavaForConditionalGeneration, its initialisation, and the heads used only in training."""

# transformers declares submodules and weights as plain nn.Module attributes, which only run time resolves
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vtprune.tiny import vocabulary
from vtprune.tiny.training.packing import COLOR_CLASSES, KIND_CLASSES, NAMES, NO_REGION
from vtprune.tiny.training.recipe import READ_HEADS
from vtprune.tiny.vocabulary import (
    ASKED_COLORS,
    ASKED_KINDS,
    COLORS,
    COLUMNS,
    GRID,
    KINDS,
    ROWS,
    VISUAL_TOKENS,
    WORD_IDS,
)

VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 128, 4, 4
WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, HIDDEN = 160, 4, 2, 12, 320
_POSITION_AMPLITUDE = 0.5
_NEIGHBOUR_GAIN = 4.2
# the residual stream starts large against what each layer adds: with 0.5 / 0.3 / 0.2 the tokens were drowned by layer 4
# and deep look-ups found the right object but not its colour (dev, 500 steps)
_WORD_SPREAD, _SYMBOL_SPREAD, _RESIDUAL_GAIN = 1.2, 0.7, 0.1
_COPY_GAIN, _ANSWER_GAIN = 0.5, 0.3


def build_config() -> LlavaConfig:
    """Configuration of the tiny LLaVA: 128 px, patch 8, 256 visual tokens, 12 decoder layers."""
    special = {
        "pad_token_id": vocabulary.PAD,
        "bos_token_id": vocabulary.BOS,
        "eos_token_id": vocabulary.EOS,
    }
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=vocabulary.IMAGE_SIZE,
        patch_size=vocabulary.PATCH_SIZE,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary.WORDS),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **special,
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


def build_llava() -> LlavaForConditionalGeneration:
    """The network with random weights from torch's global generator.

    On a CPU, compiled, plain attention is the faster one for the ViT and fused attention for the decoder.
    """
    model = LlavaForConditionalGeneration(build_config())
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    with torch.no_grad():
        _init_vision_positions(model)
        _init_neighbour_heads(model)
        for name, weight in model.named_parameters():
            if "vision_tower" not in name and weight.ndim > 1:
                _init_matrix(name, weight)
    return model


def _init_matrix(name: str, weight: torch.Tensor) -> None:
    if "embed_tokens" in name:
        weight.normal_(0, _WORD_SPREAD)
        weight[vocabulary.PAD] = 0
    elif "lm_head" in name:
        weight.normal_(0, 0.02)
    else:
        into_residual = "o_proj" in name or "down_proj" in name
        weight.normal_(0, weight.shape[1] ** -0.5 * (_RESIDUAL_GAIN if into_residual else 1))


def vision_layers(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The CLIP encoder layers."""
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
    direct = ((-1, 0), (1, 0), (0, -1), (0, 1))
    diagonal = ((-1, -1), (-1, 1), (1, -1), (1, 1))
    chosen = range(0, 16, 2)
    frequencies = _frequencies()
    for layer, offsets in enumerate((direct, diagonal)):
        attention = vision_layers(model)[layer].self_attn
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


class SymbolTokens(nn.Module):
    """Stand-ins for visual tokens, made of labels: kind + colour + region + is-centre + patch row + patch column."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (KIND_CLASSES, COLOR_CLASSES, NO_REGION + 1, 2)
        self.parts = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)
        for part in self.parts:
            nn.init.normal_(part.weight, 0, _SYMBOL_SPREAD)
        self._init_positions()

    def _init_positions(self) -> None:
        half = WIDTH // 2
        frequencies = torch.exp(-math.log(40.0) * torch.arange(half // 2) / (half // 2)) * 0.8
        angles = torch.arange(GRID)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1) * _SYMBOL_SPREAD / 2
        table = torch.cat([waves, torch.zeros(GRID, WIDTH - waves.shape[1])], 1)
        self.row = nn.Parameter(table.clone())
        self.column = nn.Parameter(table.flip(1).clone())

    def forward(self, labels: np.ndarray) -> torch.Tensor:
        """[B, 5, N] patch labels -> [B, N, D] tokens."""
        index = torch.from_numpy(labels).clamp(min=0)
        columns = (0, 1, 2, 4)
        tokens = sum(part(index[:, column]) for part, column in zip(self.parts, columns, strict=True))
        return tokens + self.row.repeat_interleave(GRID, 0) + self.column.repeat(GRID, 1)


class Trainee(nn.Module):
    """The model with what only training needs: label heads on the ViT and the symbol tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.llava = build_llava()
        self.patch_kind = nn.Linear(VISION_WIDTH, KIND_CLASSES)
        self.patch_color = nn.Linear(VISION_WIDTH, COLOR_CLASSES)
        self.patch_region = nn.Linear(VISION_WIDTH, NO_REGION)
        self.patch_center = nn.Linear(VISION_WIDTH, 2)
        self.class_names = nn.Linear(VISION_WIDTH, NAMES)
        self.symbols = SymbolTokens()
        with torch.no_grad():
            self._share_words()
            self._init_copying_heads()

    def _share_words(self) -> None:
        """Words, symbols and answers start from the same vectors: "red" asked, seen and said."""
        embed = self.llava.get_input_embeddings().weight
        kind, color, region, _ = (part.weight for part in self.symbols.parts)
        for target, words in ((kind, KINDS[:ASKED_KINDS]), (color, COLORS[:ASKED_COLORS])):
            rows = embed[[WORD_IDS[word] for word in words]]
            target[1 : len(words) + 1] = rows * (_SYMBOL_SPREAD / _WORD_SPREAD)
        for place in range(NO_REGION):
            row, column = WORD_IDS[ROWS[place // 3]], WORD_IDS[COLUMNS[place % 3]]
            region[place] = (embed[row] + embed[column]) * (_SYMBOL_SPREAD / _WORD_SPREAD / math.sqrt(2))
        self.llava.lm_head.weight.add_(nn.functional.normalize(embed, dim=1) * _ANSWER_GAIN)

    def _init_copying_heads(self) -> None:
        """The taught heads of all layers start by copying kind, colour and region of what they look at.

        The same copy in every layer: an answer read at layer 7 then arrives in the form in which one read at layer 1
        does, and what decodes it is learnt once for all kinds of question. Without it each layer needs to learn its
        own copy from its one kind of question (dev after 500 steps: 88 % for one kind, 15 % for the deeper ones).
        """
        kind, color, region, _ = (part.weight for part in self.symbols.parts)
        content = torch.cat([kind[1:], color[1:], region[:NO_REGION]])
        width = WIDTH // HEADS
        basis = torch.linalg.svd(content, full_matrices=False).Vh[:width]
        for layer in self.llava.model.language_model.layers:
            attention = layer.self_attn
            attention.v_proj.weight[:width] = basis
            for head in range(READ_HEADS):
                attention.o_proj.weight[:, head * width : (head + 1) * width] = _COPY_GAIN * basis.T

    def compile_layers(self) -> None:
        """Compiles each transformer layer on its own: small graphs, quick to build."""
        for layer in (*vision_layers(self.llava), *self.llava.model.language_model.layers):
            layer.compile(dynamic=False)
