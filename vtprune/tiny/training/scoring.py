"""Exact match of whole answers, including <eos>: greedy decoding equals teacher forcing when every word is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vtprune.tiny.training.decoder import answer_logits, drop_visual, pack_inputs, run_decoder, run_layer
from vtprune.tiny.training.packing import Batch
from vtprune.tiny.training.vlms import Vlm


class Scores:
    """Right or wrong by question, kept with its picture, so that intervals can resample pictures."""

    def __init__(self) -> None:
        self.by_kind: dict[str, list[tuple[int, bool]]] = {}

    def add(self, batch: Batch, right_words: np.ndarray, pictures: list[int]) -> None:
        """`right_words`: [R] bool in the order of `batch.targets`; `pictures`: a number for every row."""
        whole: dict[tuple[int, int], bool] = {}
        for (row, _, _, question, _), right in zip(batch.targets.tolist(), right_words.tolist(), strict=True):
            whole[row, question] = whole.get((row, question), True) and right
        for (row, question), right in whole.items():
            kind = batch.drafts[row][question].kind
            self.by_kind.setdefault(kind, []).append((pictures[row], right))

    def _rows(self, kinds: list[str]) -> np.ndarray:
        return np.array([row for kind in kinds for row in self.by_kind.get(kind, [])], np.int64).reshape(-1, 2)

    def interval(self, kinds: list[str]) -> tuple[float, float, float, int]:
        """(percent right, 2.5 % and 97.5 % bootstrap quantiles over pictures, number of questions)."""
        rows = self._rows(kinds)
        _, picture = np.unique(rows[:, 0], return_inverse=True)
        asked = np.bincount(picture).astype(float)
        right = np.bincount(picture, weights=rows[:, 1])
        draws = np.random.default_rng(0).integers(0, len(asked), (2000, len(asked)))
        resampled = right[draws].sum(1) / asked[draws].sum(1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        accuracy, low, high = (round(100 * float(v), 1) for v in (right.sum() / asked.sum(), low, high))
        return accuracy, low, high, int(asked.sum())

    def summary(self) -> dict[str, float]:
        """Percent right by kind, and over all scene questions as "scenes"."""
        table = {kind: [kind] for kind in sorted(self.by_kind)}
        scenes = [kind for kind in self.by_kind if kind != "easy"]
        if scenes:
            table["scenes"] = scenes
        return {name: round(100 * float(self._rows(kinds)[:, 1].mean()), 1) for name, kinds in table.items()}


Visual = Callable[[Batch], torch.Tensor]
Keep = Callable[[Batch, torch.Tensor], torch.Tensor]


def score(vlm: Vlm, batches: list[Batch], visual: Visual, keep: Keep | None = None) -> Scores:
    """Scores packed batches with the visual tokens `visual(batch)`, of which `keep` may choose some."""
    scores, first = Scores(), 0
    with torch.no_grad():
        for batch in batches:
            tokens = visual(batch)
            packed = pack_inputs(vlm, batch, tokens, keep(batch, tokens) if keep else None)
            output, _ = run_decoder(vlm, packed)
            logits, words = answer_logits(vlm, batch, output, packed.prefix)
            scores.add(batch, (logits.argmax(-1) == words).numpy(), list(range(first, first + len(batch.ids))))
            first += len(batch.ids)
    return scores


def score_dropped(vlm: Vlm, batches: list[Batch], visual: Visual) -> dict[int, dict[str, float]]:
    """Summary by k = 0..layers, where all visual tokens are dropped after the first k decoder layers."""
    layers = len(vlm.decoder.layers)
    scores = {k: Scores() for k in range(layers + 1)}
    first = 0
    with torch.no_grad():
        for batch in batches:
            packed = pack_inputs(vlm, batch, visual(batch))
            pictures = list(range(first, first + len(batch.ids)))
            nothing = torch.zeros(len(batch.ids), 0, dtype=torch.long)
            for k in range(layers + 1):
                blind = drop_visual(packed, nothing)
                output, _ = run_decoder(vlm, blind, first=k)
                logits, words = answer_logits(vlm, batch, output, blind.prefix)
                scores[k].add(batch, (logits.argmax(-1) == words).numpy(), pictures)
                if k < layers:
                    packed = packed._replace(hidden=run_layer(vlm, k, packed))
            first += len(batch.ids)
    return {k: entry.summary() for k, entry in scores.items()}
