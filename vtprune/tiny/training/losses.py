"""Losses: answers, where the taught heads look, and the renderer's labels."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtprune.tiny.questions import COUNT_OVER, LOOK_AT
from vtprune.tiny.training.decoder import Packed
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.packing import COLOR_CLASSES, IGNORE, KIND_CLASSES, NO_REGION, Batch
from vtprune.tiny.training.recipe import COMPARE_LAYER, EOS_WEIGHT, READ_HEADS, VERDICT_LAYER
from vtprune.tiny.vocabulary import PREFIX, SHAPES, WORD_IDS

_TINY = 1e-4
_CLEAR_PX = 8


def answer_loss(logits: torch.Tensor, words: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted cross-entropy over answer words and <eos>, and the share of right answer words."""
    is_eos = torch.from_numpy(batch.targets[:, 4]).float()
    weight = 1 - is_eos * (1 - EOS_WEIGHT)
    loss = functional.cross_entropy(logits, words, reduction="none")
    right = (logits.argmax(-1) == words).float() * (1 - is_eos)
    return (loss * weight).sum() / weight.sum(), float(right.sum() / (1 - is_eos).sum())


def _visual_attention(
    model: LlavaForConditionalGeneration, layer: int, hidden: torch.Tensor, packed: Packed, rows: torch.Tensor
) -> torch.Tensor:
    """Attention [rows, READ_HEADS, 1 + V] that text tokens pay to <bos> and to the visual tokens in one layer.

    Recomputed from the layer's input, so that the layer itself may run fused and compiled.
    rows: [rows, 2] picture, text position.
    """
    block = model.model.language_model.layers[layer]
    attention = block.self_attn
    width = attention.head_dim
    normed = block.input_layernorm(hidden)
    # heads 0..READ_HEADS-1 share key head 0: 4 query heads over 2 key heads
    query = functional.linear(normed, attention.q_proj.weight[: READ_HEADS * width])
    key = functional.linear(normed, attention.k_proj.weight[:width])
    size, length, _ = query.shape
    cosine, sine = model.model.language_model.rotary_emb(hidden, packed.positions)
    query = query.view(size, length, READ_HEADS, width).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key[:, None], cosine, sine)
    picked = query[rows[:, 0], :, packed.prefix + rows[:, 1]]
    scores = torch.einsum("rhd,rsd->rhs", picked, key[rows[:, 0], 0]) * width**-0.5
    scores = scores + packed.mask[rows[:, 0], 0, packed.prefix + rows[:, 1]][:, None]
    weights = scores.softmax(-1)
    return torch.cat([weights[..., :1], weights[..., len(PREFIX) : packed.prefix]], -1)


def _wanted(batch: Batch, reads: np.ndarray, keep: torch.Tensor | None) -> torch.Tensor:
    """[reads, 1 + V] float mask of where each read should look: <bos> first, then the visual tokens present."""
    owner, is_center = batch.labels[:, 3], batch.labels[:, 4]
    if keep is not None:
        owner = np.take_along_axis(owner, keep.numpy(), 1)
        is_center = np.take_along_axis(is_center, keep.numpy(), 1)
    rows, bits, mode = reads[:, 0], reads[:, 2], reads[:, 3]
    owner = owner[rows]
    wanted = (owner >= 0) & ((bits[:, None] >> np.maximum(owner, 0)) & 1 > 0)
    wanted &= (mode != COUNT_OVER)[:, None] | (is_center[rows] == 1)
    return torch.from_numpy(np.concatenate([(mode != LOOK_AT)[:, None], wanted], 1)).float()


def read_loss(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    packed: Packed,
    inputs: list[torch.Tensor],
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Teaches the first heads of one layer per kind of question where to look.

    A look-up wants its attention mass anywhere on the asked object; a count wants it spread evenly over <bos> and
    the centres of what is counted, so that the share of <bos> tells the number.

    Returns:
        (loss, mean attention mass on the asked object).
    """
    reads = batch.reads
    if not len(reads):
        return torch.zeros(()), 0.0
    wanted_all = _wanted(batch, reads, keep)
    total, masses = torch.zeros(()), []
    for layer in np.unique(reads[:, 4]):
        chosen = reads[:, 4] == layer
        rows, wanted = torch.from_numpy(reads[chosen][:, :2]), wanted_all[torch.from_numpy(chosen)]
        counting = torch.from_numpy(reads[chosen][:, 3] == COUNT_OVER)
        attention = _visual_attention(model, int(layer), inputs[layer], packed, rows)
        mass = (attention * wanted[:, None]).sum(-1)
        looking = ~counting & (wanted.sum(1) > 0)
        total = total - (mass[looking] + _TINY).log().sum() / READ_HEADS
        if looking.any():
            masses.append(float(mass[looking].detach().mean()))
        if counting.any():
            even = wanted[counting] / wanted[counting].sum(1, keepdim=True)
            entropy = torch.special.entr(even).sum(-1)
            cross = -(even[:, None] * (attention[counting] + _TINY).log()).sum(-1)
            total = total + (cross - entropy[:, None]).sum() / READ_HEADS
    return total / len(reads), float(np.mean(masses)) if masses else 0.0


def compare_loss(
    model: LlavaForConditionalGeneration, batch: Batch, packed: Packed, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Teaches relations their first step: which of the two named objects is higher, and which further left.

    Read at the end of the second name from the input of layer COMPARE_LAYER, as the words above/below and left/right.
    Without it yes or no depends on the product of a comparison and the asked word, and stayed at chance.
    """
    compares = torch.from_numpy(batch.compares)
    total = torch.zeros(())
    for column, words in enumerate((("above", "below"), ("left", "right"))):
        distance = compares[:, 2 + column]
        logit = _word_choice(model, inputs[COMPARE_LAYER], packed, compares, words)
        clear = (distance.abs() >= _CLEAR_PX).float()
        # the first object is above when the second lies further down
        loss = functional.binary_cross_entropy_with_logits(logit, (distance > 0).float(), reduction="none")
        total = total + (loss * clear).sum() / clear.sum().clamp(min=1)
    return total


def verdict_loss(
    model: LlavaForConditionalGeneration, batch: Batch, packed: Packed, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Teaches relations their second step: yes or no, at the same word, from the input of layer VERDICT_LAYER."""
    compares = torch.from_numpy(batch.compares)
    logit = _word_choice(model, inputs[VERDICT_LAYER], packed, compares, ("yes", "no"))
    loss = functional.binary_cross_entropy_with_logits(logit, compares[:, 4].float(), reduction="sum")
    return loss / max(1, len(compares))


def _word_choice(
    model: LlavaForConditionalGeneration,
    hidden: torch.Tensor,
    packed: Packed,
    compares: torch.Tensor,
    words: tuple[str, str],
) -> torch.Tensor:
    """Logit [C] of the first of two words against the second."""
    normed = model.model.language_model.norm(hidden[compares[:, 0], packed.prefix + compares[:, 1]])
    first, second = (model.lm_head.weight[WORD_IDS[word]] for word in words)
    return normed @ (first - second)


def label_loss(trainee: Trainee, encoded: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Patch labels and the CLS names of askable objects, from the ViT output [B, 1 + N, D_vision].

    Clutter has patch labels of its own, but CLS never names it.
    """
    kind, color, region, _, center = (torch.from_numpy(column) for column in np.moveaxis(batch.labels, 1, 0))
    patches = encoded[:, 1:]
    heads = {
        "kind": (trainee.patch_kind, kind, torch.tensor([0.3] + [1.0] * (KIND_CLASSES - 1))),
        "color": (trainee.patch_color, color, torch.tensor([0.3] + [1.0] * (COLOR_CLASSES - 1))),
        "region": (trainee.patch_region, torch.where(region == NO_REGION, IGNORE, region), None),
        "center": (trainee.patch_center, center, torch.tensor([0.5, 3.0])),
    }
    total, report = torch.zeros(()), {}
    foreground = {"kind": kind > 0, "color": kind > 0, "region": kind > 0, "center": center == 1}
    for name, (head, label, weight) in heads.items():
        logits = head(patches)
        total = total + functional.cross_entropy(
            logits.flatten(0, 1), label.flatten(), weight=weight, ignore_index=IGNORE
        )
        right = logits.argmax(-1) == label
        report[name] = round(float(right[foreground[name]].float().mean()), 3)
        if name == "kind":
            is_digit = (kind > len(SHAPES)) & (kind <= len(SHAPES) + 10)
            report["digit"] = round(float(right[is_digit].float().mean()), 3)
    names = torch.from_numpy(batch.names)
    known = names[:, 0] >= 0
    naming = functional.binary_cross_entropy_with_logits(
        trainee.class_names(encoded[known, 0]), names[known], pos_weight=torch.tensor(3.0)
    )
    report["names"] = round(float(naming.detach()), 4)
    return total + 3 * naming, report
