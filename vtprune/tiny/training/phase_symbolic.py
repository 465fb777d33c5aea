"""Phase 2: the decoder alone learns to answer from symbol tokens, and where and at which depth to look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune.tiny.training.decoder import answer_logits, pack_inputs, run_decoder
from vtprune.tiny.training.losses import answer_loss, compare_loss, place_loss, read_loss, verdict_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, cosine
from vtprune.tiny.training.packing import Batch, scene_batch
from vtprune.tiny.training.recipe import TRAINING_WEIGHTS, Recipe
from vtprune.tiny.training.scoring import score, score_dropped
from vtprune.tiny.training.vlms import TokenGrid

DECODER_PARTS = ("vlm.hf.model.language_model", "vlm.hf.lm_head", "place")
_TRAINED = (*DECODER_PARTS, "symbols")
_FIRST_SCENE = 10_000_000
DEV_SEED = 123


def choose_patches(batch: Batch, rng: np.random.Generator, count: int) -> torch.Tensor:
    """[B, count] ascending tokens: every object's centre, up to two more of most objects, the rest random.

    Cheaper than all of them while the decoder learns what to look for.
    """
    owner, is_center = batch.labels[:, 3], batch.labels[:, 4]
    rank = rng.random(owner.shape)
    for row in range(len(owner)):
        for number in range(owner[row].max() + 1):
            patches = rng.permutation(np.flatnonzero((owner[row] == number) & (is_center[row] == 0)))
            rank[row, patches] -= 1
            rank[row, patches[: int(rng.integers(0, 3))]] += 3
    rank[is_center > 0] += 5
    return torch.from_numpy(np.sort(np.argsort(-rank, 1)[:, :count], 1))


def dev_batches(grid: TokenGrid, images: int, size: int, *, easy: int = 0, painted: bool = True) -> list[Batch]:
    """The first dev scenes of the training-time dev seed (other scenes than any table uses)."""
    return [
        scene_batch(grid, "dev", DEV_SEED, first, size, easy=easy, painted=painted) for first in range(0, images, size)
    ]


def train_symbolic(recipe: Recipe, folder: Path) -> Path:
    """Trains with one thread, no picture is painted. Returns the file with the weights of this phase."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    trainee = Trainee(recipe.model)
    trainee.vlm.compile_layers()
    log = CurveLog(folder / "symbolic.jsonl")
    chosen = [weight for name, weight in trainee.named_parameters() if name.startswith(_TRAINED)]
    optimizer = Optimizer([(chosen, recipe.symbolic_rate)])
    dev = dev_batches(trainee.vlm.grid, 60, recipe.symbolic_batch, easy=recipe.symbolic_easy, painted=False)
    target = folder / "symbolic.pt"
    steps, running = recipe.symbolic_steps + recipe.symbolic_full_steps, 0.0
    for step in range(steps):
        every_token = step >= recipe.symbolic_steps or not recipe.symbolic_tokens
        loss, report = _loss(trainee, recipe, step, every_token)
        norm = optimizer.step(loss, cosine(step, steps, warmup=100, floor=0.1))
        running = 0.97 * running + 0.03 * report["right"] if step else report["right"]
        if step % 25 == 0:
            log.write(step=step, norm=round(norm, 2), **{**report, "right": round(running, 3)})
        if (step and step % recipe.evaluate_every == 0) or step == steps - 1:
            fixed = np.random.default_rng(0)
            few = None if every_token else lambda b, _, r=fixed: choose_patches(b, r, recipe.symbolic_tokens)
            log.write(dev_step=step, **score(trainee.vlm, dev, lambda b: trainee.symbols(b.labels), few).summary())
            torch.save({n: w.detach() for n, w in trainee.named_parameters() if n.startswith(_TRAINED)}, target)
    for k, summary in score_dropped(trainee.vlm, dev, lambda b: trainee.symbols(b.labels)).items():
        log.write(drop_after=k, **summary)
    return target


def _loss(trainee: Trainee, recipe: Recipe, step: int, every_token: bool) -> tuple[torch.Tensor, dict[str, float]]:
    size = recipe.symbolic_batch
    first = _FIRST_SCENE + step * size
    easy = recipe.symbolic_easy
    batch = scene_batch(
        trainee.vlm.grid, "train", recipe.seed, first, size, easy=easy, painted=False, weights=TRAINING_WEIGHTS
    )
    tokens = trainee.symbols(batch.labels)
    tokens = tokens + recipe.symbolic_noise * torch.randn_like(tokens)
    keep = None
    if not every_token:
        keep = choose_patches(batch, np.random.default_rng([recipe.seed, step]), recipe.symbolic_tokens)
    packed = pack_inputs(trainee.vlm, batch, tokens, keep)
    output, inputs = run_decoder(trainee.vlm, packed)
    answers, right = answer_loss(*answer_logits(trainee.vlm, batch, output, packed.prefix), batch)
    reading, mass = read_loss(trainee.vlm, batch, packed, inputs, keep)
    comparing = compare_loss(trainee.vlm, batch, packed, inputs)
    verdict = verdict_loss(trainee.vlm, batch, packed, inputs)
    placing = place_loss(trainee, packed, inputs, keep)
    report = {
        "right": right,
        "mass": round(mass, 3),
        "answer": round(answers.item(), 3),
        "reading": round(reading.item(), 3),
        "comparing": round(comparing.item(), 3),
        "verdict": round(verdict.item(), 3),
        "placing": round(placing.item(), 3),
    }
    taught = recipe.read_weight * reading + recipe.compare_weight * (comparing + verdict)
    return answers + taught + recipe.place_weight * placing, report
