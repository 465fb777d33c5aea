"""Phase 2: the decoder alone learns to answer from symbol tokens, and where and at which depth to look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune.tiny.questions import WEIGHTS
from vtprune.tiny.training.decoder import answer_logits, pack_inputs, run_decoder
from vtprune.tiny.training.losses import answer_loss, compare_loss, read_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, SharedGradients, cosine
from vtprune.tiny.training.packing import Batch, scene_batch
from vtprune.tiny.training.recipe import FIRST_READ_LAYER, PRACTICE_WEIGHTS, READ_LAYER, Recipe
from vtprune.tiny.training.scoring import score, score_dropped
from vtprune.tiny.training.workers import run_workers

DECODER_PARTS = ("llava.model.language_model", "llava.lm_head", "symbols")
_FIRST_SCENE, _PRACTICE_SCENE = 10_000_000, 50_000_000
DEV_SEED = 123


def choose_patches(batch: Batch, rng: np.random.Generator, count: int) -> torch.Tensor:
    """[B, count] ascending patches: every object's centre, up to two more of most objects, the rest random.

    Cheaper than all 256 while the decoder learns what to look for.
    """
    owner, is_center = batch.labels[:, 3], batch.labels[:, 4]
    rank = rng.random(owner.shape)
    for row in range(len(owner)):
        for number in range(owner[row].max() + 1):
            patches = rng.permutation(np.flatnonzero((owner[row] == number) & (is_center[row] != 1)))
            rank[row, patches] -= 1
            rank[row, patches[: int(rng.integers(0, 3))]] += 3
    rank[is_center == 1] += 5
    return torch.from_numpy(np.sort(np.argsort(-rank, 1)[:, :count], 1))


def dev_batches(images: int, size: int, *, easy: int = 0, painted: bool = True) -> list[Batch]:
    """The first dev scenes of the training-time dev seed (other scenes than any table uses)."""
    return [scene_batch("dev", DEV_SEED, first, size, easy=easy, painted=painted) for first in range(0, images, size)]


@dataclass(frozen=True)
class Cycle:
    """One cosine cycle of symbolic training; `batch` counts pictures of one process."""

    name: str
    steps: int
    full_steps: int
    batch: int
    rate: float
    first_scene: int
    read_layer: Mapping[str, int]
    weights: Mapping[str, float]
    compares: bool


def train_symbolic(recipe: Recipe, folder: Path) -> Path:
    """First cycle, one process. Returns the file with the weights; no picture is painted."""
    steps, full = recipe.symbolic_steps, recipe.symbolic_full_steps
    size, rate = recipe.symbolic_batch, recipe.symbolic_rate
    cycle = Cycle("symbolic", steps, full, size, rate, _FIRST_SCENE, FIRST_READ_LAYER, WEIGHTS, False)
    return _train(0, recipe, cycle, folder, None, None)


def train_practice(recipe: Recipe, folder: Path) -> Path:
    """Second cycle, all processes, from the weights of the first. Returns the file with the weights."""
    size = recipe.practice_batch // recipe.workers
    steps, full, rate = recipe.practice_steps, recipe.practice_full_steps, recipe.practice_rate
    cycle = Cycle("practice", steps, full, size, rate, _PRACTICE_SCENE, READ_LAYER, PRACTICE_WEIGHTS, True)
    start = folder / "symbolic.pt"
    run_workers(_practice, recipe, (recipe, cycle, folder, start))
    return folder / "practice.pt"


def _practice(
    rank: int, buffer: torch.Tensor, barrier: Any, recipe: Recipe, cycle: Cycle, folder: Path, start: Path
) -> None:
    _train(rank, recipe, cycle, folder, start, SharedGradients(buffer, barrier, rank))


def _train(
    rank: int, recipe: Recipe, cycle: Cycle, folder: Path, start: Path | None, shared: SharedGradients | None
) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    trainee = Trainee()
    if start is not None:
        trainee.load_state_dict(torch.load(start), strict=False)
    trainee.compile_layers()
    log = CurveLog(folder / f"{cycle.name}.jsonl", enabled=rank == 0)
    chosen = [weight for name, weight in trainee.named_parameters() if name.startswith(DECODER_PARTS)]
    optimizer = Optimizer([(chosen, cycle.rate)], shared)
    dev = dev_batches(60, cycle.batch, painted=False) if rank == 0 else []
    target = folder / f"{cycle.name}.pt"
    torch.manual_seed(recipe.seed + rank)
    steps, running = cycle.steps + cycle.full_steps, 0.0
    for step in range(steps):
        every_token = step >= cycle.steps
        loss, report = _loss(trainee, recipe, cycle, step * (recipe.workers if shared else 1) + rank, every_token)
        norm = optimizer.step(loss, cosine(step, steps, warmup=100, floor=0.15))
        running = 0.97 * running + 0.03 * report["right"] if step else report["right"]
        if step % 25 == 0:
            log.write(step=step, norm=round(norm, 2), **{**report, "right": round(running, 3)})
        if rank == 0 and ((step and step % recipe.evaluate_every == 0) or step == steps - 1):
            fixed = np.random.default_rng(0)
            few = None if every_token else lambda b, _, r=fixed: choose_patches(b, r, recipe.symbolic_tokens)
            summary = score(trainee.llava, dev, lambda b: trainee.symbols(b.labels), few).summary()
            log.write(dev_step=step, **summary)
            weights = {n: w.detach() for n, w in trainee.named_parameters() if n.startswith(DECODER_PARTS)}
            torch.save(weights, target)
    if rank == 0:
        for k, summary in score_dropped(trainee.llava, dev, lambda b: trainee.symbols(b.labels)).items():
            log.write(drop_after=k, **summary)
    return target


def _loss(
    trainee: Trainee, recipe: Recipe, cycle: Cycle, number: int, every_token: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss on batch `number` of the cycle."""
    batch = scene_batch(
        "train",
        recipe.seed,
        cycle.first_scene + number * cycle.batch,
        cycle.batch,
        painted=False,
        weights=cycle.weights,
        read_layer=cycle.read_layer,
    )
    tokens = trainee.symbols(batch.labels)
    tokens = tokens + recipe.symbolic_noise * torch.randn_like(tokens)
    rng = np.random.default_rng([recipe.seed, number])
    keep = None if every_token else choose_patches(batch, rng, recipe.symbolic_tokens)
    packed = pack_inputs(trainee.llava, batch, tokens, keep)
    output, inputs = run_decoder(trainee.llava, packed)
    answers, right = answer_loss(*answer_logits(trainee.llava, batch, output, packed.prefix), batch)
    reading, mass = read_loss(trainee.llava, batch, packed, inputs, keep)
    report = {
        "right": right,
        "mass": round(mass, 3),
        "answer": round(answers.item(), 3),
        "reading": round(reading.item(), 3),
    }
    loss = answers + recipe.read_weight * reading
    if cycle.compares:
        comparing = compare_loss(trainee.llava, batch, packed, inputs)
        report["comparing"] = round(comparing.item(), 3)
        loss = loss + recipe.compare_weight * comparing
    return loss, report
