"""The phases of a run, from files to files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from vtprune.tiny.training.plus.network import NAME
from vtprune.tiny.training.plus.recipe import PlusRecipe

PHASES = ("all", "joint", "export", "measure", "card")


def run_phases(phase: str, seed: int, folder: Path, split: str, quick: bool) -> None:
    """Trains, exports, measures and writes the card, or one of these."""
    from vtprune.tiny.training.plus import card, export, measure
    from vtprune.tiny.training.plus import phase as training

    torch.set_num_threads(1)
    recipe, shipped = PlusRecipe(seed=seed), folder / NAME
    if phase in ("all", "joint"):
        training.train_plus(recipe, folder)
    if phase in ("all", "export"):
        export.export(folder, shipped)
        shutil.copyfile(folder / training.CURVE, shipped / training.CURVE)
    results = folder / f"results-{split}{'-quick' if quick else ''}.json"
    if phase in ("all", "measure"):
        results.write_text(json.dumps(measure.measure(shipped, split, quick), indent=1), encoding="utf-8")
    if phase in ("all", "card"):
        card.write_card(recipe, json.loads(results.read_text(encoding="utf-8")), split, shipped)
