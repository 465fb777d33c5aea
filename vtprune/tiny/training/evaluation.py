"""All measurements of the model card: by type, against tokens, and against the depth at which tokens are dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from vtprune.tiny.questions import KINDS_OF_QUESTION
from vtprune.tiny.training import pruning
from vtprune.tiny.training.decoder import (
    Packed,
    answer_logits,
    drop_visual,
    encode_images,
    pack_inputs,
    project,
    run_decoder,
    run_layer,
)
from vtprune.tiny.training.easy import easy_pictures
from vtprune.tiny.training.packing import Batch, collate, easy_labels, scene_batch
from vtprune.tiny.training.scoring import Scores, score, score_dropped
from vtprune.tiny.vocabulary import VISUAL_TOKENS

KEEPS = (128, 64, 28, 16, 8)
FASTV_LAYERS = (1, 2, 4)
RANDOM_SEEDS = 3
_SIZE, _TEXT, _ROW_TEXT, _ROWS = 10, 176, 24, 40
Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """How many pictures of `split` each part of the evaluation uses; `seed` picks the scenes."""

    split: str
    seed: int = 0
    scenes: int = 200
    easy: int = 60
    easy_full: int = 1000
    row_scenes: int = 40
    row_easy: int = 20
    drop_scenes: int = 60


def scene_batches(sample: Sample, images: int) -> list[Batch]:
    """Scenes 0 .. images-1 with 14 packed questions each."""
    return [
        scene_batch(sample.split, sample.seed, first, _SIZE, text_tokens=_TEXT) for first in range(0, images, _SIZE)
    ]


def easy_batches(split: str, images: int) -> list[Batch]:
    """The first easy-VQA pictures of a split with all their questions."""
    pictures = easy_pictures(split)[:images]
    batches = []
    for first in range(0, len(pictures), _SIZE):
        chosen = pictures[first : first + _SIZE]
        labels, names = zip(*map(easy_labels, chosen), strict=True)
        drafts = [picture.drafts for picture in chosen]
        batches.append(collate([picture.pixels for picture in chosen], list(labels), list(names), drafts, _TEXT))
    return batches


def intervals(scores: Scores) -> dict[str, tuple[float, float, float, int]]:
    """(percent, low, high, questions) by kind, and over all scene questions as "scenes"."""
    kinds = [kind for kind in (*KINDS_OF_QUESTION, "easy") if kind in scores.by_kind]
    table = {kind: scores.interval([kind]) for kind in kinds}
    scenes = [kind for kind in kinds if kind != "easy"]
    if scenes:
        table["scenes"] = scores.interval(scenes)
    return table


def measure_packed(model: LlavaForConditionalGeneration, sample: Sample) -> Table:
    """Everything that needs no attention inside the decoder; many questions share one picture."""
    batches = scene_batches(sample, sample.scenes) + easy_batches(sample.split, sample.easy)
    with torch.no_grad():
        visual = {id(batch): project(model, encode_images(model, batch.images)) for batch in batches}
        attention = {id(batch): pruning.class_attention(model, batch.images) for batch in batches}
    table: Table = {}

    def look(batch: Batch) -> torch.Tensor:
        return visual[id(batch)]

    def none(batch: Batch, _: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.ids), 0, dtype=torch.long)

    table["all tokens"] = {str(VISUAL_TOKENS): intervals(score(model, batches, look))}
    table["no visual tokens"] = {"0": intervals(score(model, batches, look, none))}
    wrong = score(model, batches, lambda batch: look(batch).roll(1, 0))
    table["wrong image"] = {str(VISUAL_TOKENS): intervals(wrong)}
    for keep in KEEPS:
        for seed in range(RANDOM_SEEDS):
            draws = torch.Generator().manual_seed(seed)
            scores = score(model, batches, look, lambda b, _, k=keep, g=draws: pruning.random_rule(len(b.ids), k, g))
            table.setdefault(f"random {seed}", {})[str(keep)] = intervals(scores)
        rules = {
            "grid": lambda b, _, k=keep: pruning.grid_rule(len(b.ids), k),
            "CLS attention": lambda b, _, k=keep: pruning.top(attention[id(b)], k),
            "max-min": lambda _, v, k=keep: pruning.max_min_rule(v, k),
        }
        for name, rule in rules.items():
            table.setdefault(name, {})[str(keep)] = intervals(score(model, batches, look, rule))
    everything = easy_batches(sample.split, sample.easy_full)
    full = score(model, everything, lambda b: project(model, encode_images(model, b.images)))
    table["all easy-VQA pictures"] = {str(VISUAL_TOKENS): intervals(full)}
    return table


def measure_depth(model: LlavaForConditionalGeneration, sample: Sample) -> dict[str, dict[str, float]]:
    """Accuracy by k when all visual tokens are dropped after the first k decoder layers."""
    batches = scene_batches(sample, sample.drop_scenes) + easy_batches(sample.split, sample.row_easy)
    dropped = score_dropped(model, batches, lambda b: project(model, encode_images(model, b.images)))
    return {str(k): summary for k, summary in dropped.items()}


def _rows(batch: Batch, first_picture: int) -> list[tuple[Batch, list[int], list[int]]]:
    """The questions of a batch, one per row: (batch of rows, row -> picture in the batch, picture numbers)."""
    pairs = [(row, draft) for row, asked in enumerate(batch.drafts) for draft in asked]
    result = []
    for start in range(0, len(pairs), _ROWS):
        chosen = pairs[start : start + _ROWS]
        source = [row for row, _ in chosen]
        labels, names = list(batch.labels[source]), list(batch.names[source])
        rows = collate([], labels, names, [[draft] for _, draft in chosen], _ROW_TEXT)
        result.append((rows, source, [first_picture + row for row in source]))
    return result


def _score_rows(
    model: LlavaForConditionalGeneration,
    rows: Batch,
    visual: torch.Tensor,
    pictures: list[int],
    scores: dict[tuple[str, int], Scores],
    seed: int,
) -> None:
    """Full, random, oracle and FastV-like on the same rows, added to `scores` by (rule, tokens kept)."""

    def add(name: str, keep: int, packed: Packed, first: int = 0) -> None:
        output, _ = run_decoder(model, packed, first=first)
        logits, words = answer_logits(model, rows, output, packed.prefix)
        scores.setdefault((name, keep), Scores()).add(rows, (logits.argmax(-1) == words).numpy(), pictures)

    noise = torch.rand(len(rows.ids), VISUAL_TOKENS, generator=torch.Generator().manual_seed(seed))
    packed = pack_inputs(model, rows, visual)
    add("all tokens", VISUAL_TOKENS, packed)
    values = {"random": noise}
    if len(rows.reads):
        values["oracle"] = pruning.oracle_values(rows, noise)
    for name, value in values.items():
        for keep in KEEPS:
            add(name, keep, pack_inputs(model, rows, visual, pruning.top(value, keep)))
    targets = torch.from_numpy(rows.targets)
    # the first target of a row is predicted by its last prompt token
    last = torch.stack([targets[targets[:, 0] == row][0, 1] for row in range(len(rows.ids))])
    for layer in range(max(FASTV_LAYERS)):
        attention = pruning.prompt_attention(model, layer, packed, last)
        packed = packed._replace(hidden=run_layer(model, layer, packed))
        if layer + 1 in FASTV_LAYERS:
            for keep in KEEPS:
                fewer = drop_visual(packed, pruning.top(attention, keep))
                add(f"FastV-like K={layer + 1}", keep, fewer, first=layer + 1)


def measure_rows(model: LlavaForConditionalGeneration, sample: Sample) -> Table:
    """Rules that depend on the question, so one question per row, on fewer pictures."""
    scores: dict[tuple[str, int], Scores] = {}
    picture = 0
    scenes, easy = scene_batches(sample, sample.row_scenes), easy_batches(sample.split, sample.row_easy)
    with torch.no_grad():
        for batch in scenes + easy:
            visual = project(model, encode_images(model, batch.images))
            for number, (rows, source, pictures) in enumerate(_rows(batch, picture)):
                _score_rows(model, rows, visual[source], pictures, scores, 1000 * picture + number)
            picture += len(batch.ids)
    table: Table = {}
    for (name, keep), entry in scores.items():
        table.setdefault(name, {})[str(keep)] = intervals(entry)
    return table


def quick(sample: Sample) -> Sample:
    """A small version of a sample, for a look before the real thing."""
    return replace(sample, scenes=40, easy=20, easy_full=20, row_scenes=10, row_easy=10, drop_scenes=20)
