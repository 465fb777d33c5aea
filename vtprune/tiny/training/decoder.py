"""Pictures and packed questions through the network, layer by layer, so that tokens may be dropped on the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from vtprune.tiny.training.packing import Batch
from vtprune.tiny.vocabulary import PREFIX, VISUAL_TOKENS

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
_BLOCKED = -1e9


def pixels(images: np.ndarray) -> torch.Tensor:
    """[B, 128, 128, 3] uint8 -> [B, 3, 128, 128] float32, normalised as the shipped image processor does."""
    return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD).contiguous()


def encode_images(model: LlavaForConditionalGeneration, images: np.ndarray) -> torch.Tensor:
    """ViT output [B, 1 + N, D_vision], CLS first."""
    return model.model.vision_tower(pixels(images), return_dict=True).last_hidden_state


def project(model: LlavaForConditionalGeneration, encoded: torch.Tensor) -> torch.Tensor:
    """[B, 1 + N, D_vision] -> visual tokens [B, N, D] as the decoder sees them."""
    return model.model.multi_modal_projector(encoded[:, 1:])


class Packed(NamedTuple):
    """Decoder input: hidden [B, S, D], positions [B, S], mask [B, 1, S, S] (added to scores), prefix P = S - T."""

    hidden: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    prefix: int


def pack_inputs(
    model: LlavaForConditionalGeneration, batch: Batch, visual: torch.Tensor, keep: torch.Tensor | None = None
) -> Packed:
    """Decoder input of a batch.

    Args:
        visual: [B, N, D] visual tokens.
        keep: [B, V] ascending indices of the visual tokens to keep, None for all; they keep their positions.
    """
    size, _, width = visual.shape
    places = torch.arange(VISUAL_TOKENS).expand(size, -1)
    if keep is not None:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, width))
        places = keep
    embed = model.get_input_embeddings()
    start = embed(torch.tensor(PREFIX)).expand(size, -1, -1)
    hidden = torch.cat([start, visual, embed(torch.from_numpy(batch.ids))], 1)
    prefix = len(PREFIX) + visual.shape[1]
    text_start = len(PREFIX) + VISUAL_TOKENS
    positions = torch.cat(
        [
            torch.arange(len(PREFIX)).expand(size, -1),
            len(PREFIX) + places,
            text_start + torch.from_numpy(batch.positions),
        ],
        1,
    )
    segments = torch.from_numpy(batch.segments)
    length = hidden.shape[1]
    allowed = torch.zeros(size, length, length, dtype=torch.bool)
    allowed[:, :, :prefix] = True
    allowed[:, prefix:, prefix:] = segments[:, :, None] == segments[:, None, :]
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(size, 1, length, length).masked_fill_(~allowed[:, None], _BLOCKED)
    return Packed(hidden, positions, mask, prefix)


def run_layer(model: LlavaForConditionalGeneration, index: int, packed: Packed) -> torch.Tensor:
    """Hidden states [B, S, D] behind decoder layer `index`."""
    language = model.model.language_model
    rotary = language.rotary_emb(packed.hidden, packed.positions)
    output = language.layers[index](packed.hidden, attention_mask=packed.mask, position_embeddings=rotary)
    return output if torch.is_tensor(output) else output[0]


def select(packed: Packed, columns: torch.Tensor, prefix: int) -> Packed:
    """Keeps the sequence columns [B, S'] of every row; `prefix` is the new number of columns before the text."""
    width, length = packed.hidden.shape[-1], columns.shape[1]
    mask = packed.mask.gather(2, columns[:, None, :, None].expand(-1, 1, -1, packed.mask.shape[-1]))
    return Packed(
        packed.hidden.gather(1, columns[..., None].expand(-1, -1, width)),
        packed.positions.gather(1, columns),
        mask.gather(3, columns[:, None, None, :].expand(-1, 1, length, -1)),
        prefix,
    )


def drop_visual(packed: Packed, keep: torch.Tensor) -> Packed:
    """Keeps only the visual tokens `keep` [B, V] (indices into those present); V may be 0."""
    size, length = packed.positions.shape
    start = torch.arange(len(PREFIX)).expand(size, -1)
    text = torch.arange(packed.prefix, length).expand(size, -1)
    columns = torch.cat([start, len(PREFIX) + keep, text], 1)
    return select(packed, columns, len(PREFIX) + keep.shape[1])


def run_decoder(
    model: LlavaForConditionalGeneration, packed: Packed, first: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Layers `first` to the last. Returns the normed output [B, S, D] and the input of every layer that ran."""
    inputs = []
    language = model.model.language_model
    for index in range(first, len(language.layers)):
        inputs.append(packed.hidden)
        packed = packed._replace(hidden=run_layer(model, index, packed))
    return language.norm(packed.hidden), inputs


def answer_logits(
    model: LlavaForConditionalGeneration, batch: Batch, output: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, vocabulary] at the places that predict an answer word or <eos>, and the right words [R]."""
    targets = torch.from_numpy(batch.targets)
    return model.lm_head(output[targets[:, 0], prefix + targets[:, 1]]), targets[:, 2]
