"""Visual tokens and packed questions through the decoder, layer by layer, so that tokens may be dropped on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vtprune.tiny.training.packing import Batch
from vtprune.tiny.training.vlms import Vlm

_BLOCKED = -1e9


class Packed(NamedTuple):
    """Decoder input: hidden [B, S, D], positions [A, B, S] on A rotary axes, mask [B, 1, S, S] (added to scores).

    `prefix` P = S - T columns stand before the text, `before` of them before the picture.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    prefix: int
    before: int


def pack_inputs(vlm: Vlm, batch: Batch, visual: torch.Tensor, keep: torch.Tensor | None = None) -> Packed:
    """Decoder input of a batch.

    Args:
        visual: [B, N, D] visual tokens.
        keep: [B, V] ascending indices of the visual tokens to keep, None for all; they keep their positions.
    """
    size, _, width = visual.shape
    places = torch.arange(vlm.grid.tokens).expand(size, -1)
    if keep is not None:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, width))
        places = keep
    before = len(vlm.before)
    start = vlm.embed(torch.tensor(vlm.before)).expand(size, -1, -1)
    hidden = torch.cat([start, visual, vlm.embed(torch.from_numpy(batch.ids))], 1)
    prefix = before + visual.shape[1]
    seen = vlm.visual_positions(places)
    ahead, behind = torch.arange(before).expand(size, -1), vlm.text_start + torch.from_numpy(batch.positions)
    positions = torch.cat([ahead.expand(len(seen), -1, -1), seen, behind.expand(len(seen), -1, -1)], -1)
    segments = torch.from_numpy(batch.segments)
    length = hidden.shape[1]
    allowed = torch.zeros(size, length, length, dtype=torch.bool)
    allowed[:, :, :prefix] = True
    allowed[:, prefix:, prefix:] = segments[:, :, None] == segments[:, None, :]
    allowed &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(size, 1, length, length).masked_fill_(~allowed[:, None], _BLOCKED)
    return Packed(hidden, positions, mask, prefix, before)


def run_layer(vlm: Vlm, index: int, packed: Packed) -> torch.Tensor:
    """Hidden states [B, S, D] behind decoder layer `index`."""
    rotary = vlm.rotary(packed.hidden, packed.positions)
    output = vlm.decoder.layers[index](packed.hidden, attention_mask=packed.mask, position_embeddings=rotary)
    return output if torch.is_tensor(output) else output[0]


def select(packed: Packed, columns: torch.Tensor, prefix: int) -> Packed:
    """Keeps the sequence columns [B, S'] of every row; `prefix` is the new number of columns before the text."""
    width, length = packed.hidden.shape[-1], columns.shape[1]
    mask = packed.mask.gather(2, columns[:, None, :, None].expand(-1, 1, -1, packed.mask.shape[-1]))
    return Packed(
        packed.hidden.gather(1, columns[..., None].expand(-1, -1, width)),
        packed.positions.gather(-1, columns.expand(len(packed.positions), -1, -1)),
        mask.gather(3, columns[:, None, None, :].expand(-1, 1, length, -1)),
        prefix,
        packed.before,
    )


def drop_visual(packed: Packed, keep: torch.Tensor) -> Packed:
    """Keeps only the visual tokens `keep` [B, V] (indices into those present); V may be 0."""
    _, size, length = packed.positions.shape
    start = torch.arange(packed.before).expand(size, -1)
    text = torch.arange(packed.prefix, length).expand(size, -1)
    columns = torch.cat([start, packed.before + keep, text], 1)
    return select(packed, columns, packed.before + keep.shape[1])


def run_decoder(vlm: Vlm, packed: Packed, first: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Layers `first` to the last. Returns the normed output [B, S, D] and the input of every layer that ran."""
    inputs = []
    for index in range(first, len(vlm.decoder.layers)):
        inputs.append(packed.hidden)
        packed = packed._replace(hidden=run_layer(vlm, index, packed))
    return vlm.decoder.norm(packed.hidden), inputs


def answer_logits(vlm: Vlm, batch: Batch, output: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, vocabulary] at the places that predict an answer word or <eos>, and the right words [R]."""
    targets = torch.from_numpy(batch.targets)
    return vlm.hf.lm_head(output[targets[:, 0], prefix + targets[:, 1]]), targets[:, 2]
