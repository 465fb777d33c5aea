"""The phases of a training run, each from files to files; worker processes import them from here."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vtprune.tiny.training.recipe import Recipe

_LOGGER = logging.getLogger(__name__)


def run_phase(name: str, recipe: Recipe, folder: Path) -> None:
    """Runs one training phase and notes its wall time; the imports are per process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    if name == "vision":
        from vtprune.tiny.training.phase_vision import train_vision as work
    elif name == "symbolic":
        from vtprune.tiny.training.phase_symbolic import train_symbolic as work
    else:
        from vtprune.tiny.training.phase_joint import train_joint as work
    work(recipe, folder)
    wall = round(time.monotonic() - start, 1)
    (folder / f"{name}.wall.json").write_text(json.dumps(wall), encoding="utf-8")
    _LOGGER.info("%s took %s s", name, wall)


def train(phase: str, recipe: Recipe, folder: Path) -> None:
    """ViT and decoder are independent at first and run at the same time; the joint phase uses all processes."""
    early = [name for name in ("vision", "symbolic") if phase in ("all", name)]
    with ProcessPoolExecutor(len(early) or 1, mp_context=get_context("spawn")) as pool:
        for running in [pool.submit(run_phase, name, recipe, folder) for name in early]:
            running.result()
    if phase in ("all", "joint"):
        run_phase("joint", recipe, folder)


def _measure_part(part: str, model: str, folder: Path, split: str, quick: bool) -> Any:
    import torch

    from vtprune.tiny.training import evaluation, generation
    from vtprune.tiny.training.export import load_exported

    torch.set_num_threads(1)
    sample = evaluation.Sample(split)
    sample = evaluation.quick(sample) if quick else sample
    if part == "generated":
        return generation.measure_generation(folder / model, sample)
    vlm = load_exported(model, folder / model)
    measures = {
        "packed": evaluation.measure_packed,
        "rows": evaluation.measure_rows,
        "depth": evaluation.measure_depth,
    }
    return measures[part](vlm, sample)


def measure(model: str, folder: Path, split: str, quick: bool) -> None:
    """Writes results-SPLIT.json: every number of the card, from the trained weights and the exported folder."""
    parts = ("packed", "rows", "depth", "generated")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running = {part: pool.submit(_measure_part, part, model, folder, split, quick) for part in parts}
        results = {part: future.result() for part, future in running.items()}
    name = f"results-{split}{'-quick' if quick else ''}.json"
    (folder / name).write_text(json.dumps(results, indent=1), encoding="utf-8")


def write(recipe: Recipe, folder: Path, split: str, quick: bool) -> None:
    """Writes MODEL_CARD.md, curves.png and the learning curves beside the exported weights."""
    from vtprune.tiny.training import card, evaluation, plots

    name = f"results-{split}{'-quick' if quick else ''}.json"
    results = json.loads((folder / name).read_text(encoding="utf-8"))
    results["facts"] = card.collect_facts(recipe.model, folder, results)
    sample = evaluation.Sample(split)
    sample = evaluation.quick(sample) if quick else sample
    shipped = folder / recipe.model
    (shipped / "MODEL_CARD.md").write_text(card.write_card(results, recipe, sample), encoding="utf-8")
    plots.draw_curves(recipe.model, folder, results, shipped / "curves.png")
    for log in ("vision", "symbolic", "joint"):
        (shipped / f"{log}.jsonl").write_text((folder / f"{log}.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
