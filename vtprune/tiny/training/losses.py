"""Losses: answers, where the taught heads look, and the renderer's labels."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from vtprune.tiny.questions import COUNT_OVER, LOOK_AT
from vtprune.tiny.training.decoder import Packed
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.packing import COLOR_CLASSES, IGNORE, KIND_CLASSES, NO_REGION, Batch
from vtprune.tiny.training.recipe import COMPARE_LAYER, EOS_WEIGHT, PLACE_LAYER, READ_HEADS, VERDICT_LAYER
from vtprune.tiny.training.vlms import Encoded, Vlm
from vtprune.tiny.vocabulary import SHAPES, WORD_IDS

_TINY = 1e-4
_CLEAR_PX = 8


def answer_loss(logits: torch.Tensor, words: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted cross-entropy over answer words and <eos>, and the share of right answer words."""
    is_eos = torch.from_numpy(batch.targets[:, 4]).float()
    weight = 1 - is_eos * (1 - EOS_WEIGHT)
    loss = functional.cross_entropy(logits, words, reduction="none")
    right = (logits.argmax(-1) == words).float() * (1 - is_eos)
    return (loss * weight).sum() / weight.sum(), float(right.sum() / (1 - is_eos).sum())


def _visual_attention(vlm: Vlm, layer: int, hidden: torch.Tensor, packed: Packed, rows: torch.Tensor) -> torch.Tensor:
    """Attention [rows, READ_HEADS, 1 + V] that text tokens pay to <bos> and to the visual tokens in one layer.

    rows: [rows, 2] picture, text position.
    """
    # heads 0..READ_HEADS-1 share key head 0: 4 query heads over 2 key heads
    query, key = vlm.heads(layer, hidden, packed.positions, READ_HEADS, 1)
    picked = query[rows[:, 0], :, packed.prefix + rows[:, 1]]
    scores = torch.einsum("rhd,rsd->rhs", picked, key[rows[:, 0], 0]) * picked.shape[-1] ** -0.5
    scores = scores + packed.mask[rows[:, 0], 0, packed.prefix + rows[:, 1]][:, None]
    weights = scores.softmax(-1)
    return torch.cat([weights[..., :1], weights[..., packed.before : packed.prefix]], -1)


def _wanted(batch: Batch, reads: np.ndarray, keep: torch.Tensor | None, centers: bool) -> torch.Tensor:
    """[reads, 1 + V] float mask of where each read should look: <bos> first, then the visual tokens present.

    `centers`: at the centres of objects only, as a count always does.
    """
    owner, is_center = batch.labels[:, 3], batch.labels[:, 4]
    if keep is not None:
        owner = np.take_along_axis(owner, keep.numpy(), 1)
        is_center = np.take_along_axis(is_center, keep.numpy(), 1)
    rows, bits, mode = reads[:, 0], reads[:, 2], reads[:, 3]
    owner = owner[rows]
    wanted = (owner >= 0) & ((bits[:, None] >> np.maximum(owner, 0)) & 1 > 0)
    wanted &= ((mode != COUNT_OVER) & (not centers))[:, None] | (is_center[rows] > 0)
    return torch.from_numpy(np.concatenate([(mode != LOOK_AT)[:, None], wanted], 1)).float()


def read_loss(
    vlm: Vlm,
    batch: Batch,
    packed: Packed,
    inputs: list[torch.Tensor],
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Teaches the first heads of one layer per kind of question where to look.

    A look-up wants its attention mass anywhere on the asked object (on its centre where tokens know only their own
    place); a count wants it spread evenly over <bos> and the centres of what is counted, so that the share of <bos>
    tells the number.

    Returns:
        (loss, mean attention mass on the asked object).
    """
    reads = batch.reads
    if not len(reads):
        return torch.zeros(()), 0.0
    wanted_all = _wanted(batch, reads, keep, vlm.places_from_rotary)
    total, masses = torch.zeros(()), []
    for layer in np.unique(reads[:, 4]):
        chosen = reads[:, 4] == layer
        rows, wanted = torch.from_numpy(reads[chosen][:, :2]), wanted_all[torch.from_numpy(chosen)]
        counting = torch.from_numpy(reads[chosen][:, 3] == COUNT_OVER)
        attention = _visual_attention(vlm, int(layer), inputs[layer], packed, rows)
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


def compare_loss(vlm: Vlm, batch: Batch, packed: Packed, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Teaches relations their first step: which of the two named objects is higher, and which further left.

    Read at the end of the second name from the input of layer COMPARE_LAYER, as the words above/below and left/right.
    Without it yes or no depends on the product of a comparison and the asked word, and stayed at chance.
    """
    compares = torch.from_numpy(batch.compares)
    total = torch.zeros(())
    for column, words in enumerate((("above", "below"), ("left", "right"))):
        distance = compares[:, 2 + column]
        logit = _word_choice(vlm, inputs[COMPARE_LAYER], packed, compares, words)
        clear = (distance.abs() >= _CLEAR_PX).float()
        # the first object is above when the second lies further down
        loss = functional.binary_cross_entropy_with_logits(logit, (distance > 0).float(), reduction="none")
        total = total + (loss * clear).sum() / clear.sum().clamp(min=1)
    return total


def verdict_loss(vlm: Vlm, batch: Batch, packed: Packed, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Teaches relations their second step: yes or no, at the same word, from the input of layer VERDICT_LAYER."""
    compares = torch.from_numpy(batch.compares)
    logit = _word_choice(vlm, inputs[VERDICT_LAYER], packed, compares, ("yes", "no"))
    loss = functional.binary_cross_entropy_with_logits(logit, compares[:, 4].float(), reduction="sum")
    return loss / max(1, len(compares))


def _word_choice(
    vlm: Vlm,
    hidden: torch.Tensor,
    packed: Packed,
    compares: torch.Tensor,
    words: tuple[str, str],
) -> torch.Tensor:
    """Logit [C] of the first of two words against the second."""
    normed = vlm.decoder.norm(hidden[compares[:, 0], packed.prefix + compares[:, 1]])
    first, second = (vlm.hf.lm_head.weight[WORD_IDS[word]] for word in words)
    return normed @ (first - second)


def place_loss(trainee: Trainee, packed: Packed, inputs: list[torch.Tensor], keep: torch.Tensor | None) -> torch.Tensor:
    """Teaches visual tokens their row and column, readable at the input of layer PLACE_LAYER.

    Rotary positions act on queries and keys only; what a look at a token returns holds its place only if an earlier
    layer has written it there. Zero where the tower tells places.
    """
    if trainee.place is None:
        return torch.zeros(())
    side = trainee.vlm.grid.side
    hidden = inputs[PLACE_LAYER][:, packed.before : packed.prefix]
    logits = trainee.place(trainee.vlm.decoder.norm(hidden)).unflatten(-1, (2, side))
    index = torch.arange(side * side).expand(len(hidden), -1) if keep is None else keep
    wanted = torch.stack([index // side, index % side], -1)
    return functional.cross_entropy(logits.flatten(0, 2), wanted.flatten())


def label_loss(trainee: Trainee, encoded: Encoded, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Token labels from the cells, and the names of askable objects from the summary.

    Clutter has labels of its own, but the summary never names it. A tower without positions cannot tell regions.
    """
    kind, color, region, _, center = (torch.from_numpy(column) for column in np.moveaxis(batch.labels, 1, 0))
    patches, known_places = encoded.cells, not trainee.vlm.places_from_rotary
    heads = {
        "kind": (trainee.patch_kind, kind, torch.tensor([0.3] + [1.0] * (KIND_CLASSES - 1))),
        "color": (trainee.patch_color, color, torch.tensor([0.3] + [1.0] * (COLOR_CLASSES - 1))),
        "region": (trainee.patch_region, torch.where(region == NO_REGION, IGNORE, region), None),
        "center": (trainee.patch_center, center, torch.tensor([0.5] + [3.0] * (trainee.vlm.grid.center_classes - 1))),
    }
    total, report = torch.zeros(()), {}
    foreground = {"kind": kind > 0, "color": kind > 0, "region": kind > 0, "center": center > 0}
    for name, (head, label, weight) in heads.items():
        if name == "region" and not known_places:
            continue
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
        trainee.class_names(encoded.summary[known]), names[known], pos_weight=torch.tensor(3.0)
    )
    report["names"] = round(float(naming.detach()), 4)
    return total + 3 * naming, report
