"""All measurements of the model card: by type, against tokens, and against the depth at which tokens are dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vtprune.tiny.questions import KINDS_OF_QUESTION
from vtprune.tiny.training import pruning
from vtprune.tiny.training.decoder import (
    Packed,
    answer_logits,
    drop_visual,
    pack_inputs,
    run_decoder,
    run_layer,
)
from vtprune.tiny.training.easy import easy_pictures
from vtprune.tiny.training.packing import Batch, collate, easy_labels, scene_batch
from vtprune.tiny.training.scoring import Scores, score, score_dropped
from vtprune.tiny.training.vlms import TokenGrid, Vlm

SHARES = (2, 4, 9, 16, 32)
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


def keeps(tokens: int) -> list[int]:
    """The numbers of visual tokens that the tables prune to: 1/2, 1/4, 1/9, 1/16 and 1/32 of all."""
    return [max(1, tokens // share) for share in SHARES]


def scene_batches(grid: TokenGrid, sample: Sample, images: int) -> list[Batch]:
    """Scenes 0 .. images-1 with 14 packed questions each."""
    return [
        scene_batch(grid, sample.split, sample.seed, first, _SIZE, text_tokens=_TEXT)
        for first in range(0, images, _SIZE)
    ]


def easy_batches(grid: TokenGrid, split: str, images: int) -> list[Batch]:
    """The first easy-VQA pictures of a split with all their questions."""
    pictures = easy_pictures(split)[:images]
    batches = []
    for first in range(0, len(pictures), _SIZE):
        chosen = pictures[first : first + _SIZE]
        labels, names = zip(*(easy_labels(grid, picture) for picture in chosen), strict=True)
        drafts = [picture.drafts for picture in chosen]
        images_of = [picture.pixels for picture in chosen]
        batches.append(collate(grid, images_of, list(labels), list(names), drafts, _TEXT))
    return batches


def intervals(scores: Scores) -> dict[str, tuple[float, float, float, int]]:
    """(percent, low, high, questions) by kind, and over all scene questions as "scenes"."""
    kinds = [kind for kind in (*KINDS_OF_QUESTION, "easy") if kind in scores.by_kind]
    table = {kind: scores.interval([kind]) for kind in kinds}
    scenes = [kind for kind in kinds if kind != "easy"]
    if scenes:
        table["scenes"] = scores.interval(scenes)
    return table


def measure_packed(vlm: Vlm, sample: Sample) -> Table:
    """Everything that needs no attention inside the decoder; many questions share one picture."""
    grid = vlm.grid
    batches = scene_batches(grid, sample, sample.scenes) + easy_batches(grid, sample.split, sample.easy)
    with torch.no_grad():
        visual = {id(batch): vlm.see(batch.images) for batch in batches}
        attention = {id(batch): vlm.tower_attention(batch.images) for batch in batches}
    table: Table = {}

    def look(batch: Batch) -> torch.Tensor:
        return visual[id(batch)]

    def none(batch: Batch, _: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.ids), 0, dtype=torch.long)

    every = str(grid.tokens)
    table["all tokens"] = {every: intervals(score(vlm, batches, look))}
    table["no visual tokens"] = {"0": intervals(score(vlm, batches, look, none))}
    wrong = score(vlm, batches, lambda batch: look(batch).roll(1, 0))
    table["wrong image"] = {every: intervals(wrong)}
    for keep in keeps(grid.tokens):
        for seed in range(RANDOM_SEEDS):
            draws = torch.Generator().manual_seed(seed)

            def drawn(batch: Batch, _: torch.Tensor, k: int = keep, g: torch.Generator = draws) -> torch.Tensor:
                return pruning.random_rule(grid, len(batch.ids), k, g)

            table.setdefault(f"random {seed}", {})[str(keep)] = intervals(score(vlm, batches, look, drawn))
        rules = {
            "grid": lambda b, _, k=keep: pruning.grid_rule(grid, len(b.ids), k),
            vlm.query_name: lambda b, _, k=keep: pruning.top(attention[id(b)], k),
            "max-min": lambda _, v, k=keep: pruning.max_min_rule(v, k),
        }
        for name, rule in rules.items():
            table.setdefault(name, {})[str(keep)] = intervals(score(vlm, batches, look, rule))
    everything = easy_batches(grid, sample.split, sample.easy_full)
    full = score(vlm, everything, lambda batch: vlm.see(batch.images))
    table["all easy-VQA pictures"] = {every: intervals(full)}
    return table


def measure_depth(vlm: Vlm, sample: Sample) -> dict[str, dict[str, float]]:
    """Accuracy by k when all visual tokens are dropped after the first k decoder layers."""
    grid = vlm.grid
    batches = scene_batches(grid, sample, sample.drop_scenes) + easy_batches(grid, sample.split, sample.row_easy)
    dropped = score_dropped(vlm, batches, lambda batch: vlm.see(batch.images))
    return {str(k): summary for k, summary in dropped.items()}


def _rows(grid: TokenGrid, batch: Batch, first_picture: int) -> list[tuple[Batch, list[int], list[int]]]:
    """The questions of a batch, one per row: (batch of rows, row -> picture in the batch, picture numbers)."""
    pairs = [(row, draft) for row, asked in enumerate(batch.drafts) for draft in asked]
    result = []
    for start in range(0, len(pairs), _ROWS):
        chosen = pairs[start : start + _ROWS]
        source = [row for row, _ in chosen]
        labels, names = list(batch.labels[source]), list(batch.names[source])
        rows = collate(grid, [], labels, names, [[draft] for _, draft in chosen], _ROW_TEXT)
        result.append((rows, source, [first_picture + row for row in source]))
    return result


def _score_rows(
    vlm: Vlm,
    rows: Batch,
    visual: torch.Tensor,
    pictures: list[int],
    scores: dict[tuple[str, int], Scores],
    seed: int,
) -> None:
    """Full, random, oracle and FastV-like on the same rows, added to `scores` by (rule, tokens kept)."""

    def add(name: str, keep: int, packed: Packed, first: int = 0) -> None:
        output, _ = run_decoder(vlm, packed, first=first)
        logits, words = answer_logits(vlm, rows, output, packed.prefix)
        scores.setdefault((name, keep), Scores()).add(rows, (logits.argmax(-1) == words).numpy(), pictures)

    noise = torch.rand(len(rows.ids), vlm.grid.tokens, generator=torch.Generator().manual_seed(seed))
    packed = pack_inputs(vlm, rows, visual)
    add("all tokens", vlm.grid.tokens, packed)
    values = {"random": noise}
    if len(rows.reads):
        values["oracle"] = pruning.oracle_values(rows, noise)
    for name, value in values.items():
        for keep in keeps(vlm.grid.tokens):
            add(name, keep, pack_inputs(vlm, rows, visual, pruning.top(value, keep)))
    targets = torch.from_numpy(rows.targets)
    # the first target of a row is predicted by its last prompt token
    last = torch.stack([targets[targets[:, 0] == row][0, 1] for row in range(len(rows.ids))])
    for layer in range(max(FASTV_LAYERS)):
        attention = pruning.prompt_attention(vlm, layer, packed, last)
        packed = packed._replace(hidden=run_layer(vlm, layer, packed))
        if layer + 1 in FASTV_LAYERS:
            for keep in keeps(vlm.grid.tokens):
                fewer = drop_visual(packed, pruning.top(attention, keep))
                add(f"FastV-like K={layer + 1}", keep, fewer, first=layer + 1)


def measure_rows(vlm: Vlm, sample: Sample) -> Table:
    """Rules that depend on the question, so one question per row, on fewer pictures."""
    scores: dict[tuple[str, int], Scores] = {}
    picture = 0
    scenes = scene_batches(vlm.grid, sample, sample.row_scenes)
    easy = easy_batches(vlm.grid, sample.split, sample.row_easy)
    with torch.no_grad():
        for batch in scenes + easy:
            visual = vlm.see(batch.images)
            for number, (rows, source, pictures) in enumerate(_rows(vlm.grid, batch, picture)):
                _score_rows(vlm, rows, visual[source], pictures, scores, 1000 * picture + number)
            picture += len(batch.ids)
    table: Table = {}
    for (name, keep), entry in scores.items():
        table.setdefault(name, {})[str(keep)] = intervals(entry)
    return table


def quick(sample: Sample) -> Sample:
    """A small version of a sample, for a look before the real thing."""
    return replace(sample, scenes=40, easy=20, easy_full=20, row_scenes=10, row_easy=10, drop_scenes=20)
