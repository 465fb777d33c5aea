"""Phase 3: tower and decoder are joined: the projector first learns the symbol tokens, then everything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune.tiny.training.decoder import answer_logits, pack_inputs, run_decoder
from vtprune.tiny.training.losses import answer_loss, compare_loss, label_loss, place_loss, read_loss, verdict_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, SharedGradients, cosine
from vtprune.tiny.training.packing import Batch, scene_batch
from vtprune.tiny.training.phase_symbolic import DECODER_PARTS, choose_patches, dev_batches
from vtprune.tiny.training.phase_vision import vision_parts
from vtprune.tiny.training.recipe import TRAINING_WEIGHTS, Recipe
from vtprune.tiny.training.scoring import score
from vtprune.tiny.training.vlms import TokenGrid
from vtprune.tiny.training.workers import run_workers

_FIRST_ALIGN_SCENE = 20_000_000
_FIRST_SCENE = 30_000_000
_SCALE_SCENE = 40_000_000


def _projector(trainee: Trainee) -> tuple[str, ...]:
    return tuple(f"vlm.hf.{name}" for name in trainee.vlm.projector)


def _named(trainee: Trainee, prefixes: tuple[str, ...]) -> list[torch.nn.Parameter]:
    return [weight for name, weight in trainee.named_parameters() if name.startswith(prefixes)]


def _scale_projector(trainee: Trainee, recipe: Recipe) -> None:
    batch = scene_batch(trainee.vlm.grid, "train", recipe.seed, _SCALE_SCENE, recipe.align_batch, questions=0)
    with torch.no_grad():
        trainee.vlm.scale_projector(trainee.vlm.encode(batch.images).cells)


def _align(trainee: Trainee, recipe: Recipe, shared: SharedGradients, log: CurveLog) -> None:
    """Regresses the projector's output on the symbol tokens; the ViT stays as it is."""
    vlm, size = trainee.vlm, recipe.align_batch // recipe.workers
    optimizer = Optimizer([(_named(trainee, _projector(trainee)), recipe.align_rate)], shared)
    for step in range(recipe.align_steps):
        first = _FIRST_ALIGN_SCENE + (step * recipe.workers + shared.rank) * size
        batch = scene_batch(vlm.grid, "train", recipe.seed, first, size, easy=1, questions=0)
        with torch.no_grad():
            encoded = vlm.encode(batch.images)
            target = trainee.symbols(batch.labels)
        weight = torch.from_numpy((batch.labels[:, 0] > 0) + 0.5).float()[..., None]
        error = vlm.project(encoded.cells) - target
        norm = optimizer.step((error**2 * weight).mean(), cosine(step, recipe.align_steps, warmup=20))
        if step % 25 == 0 or step == recipe.align_steps - 1:
            log.write(align=step, error=round(float((error.detach() ** 2).mean()), 4), norm=round(norm, 3))


def _joint_batch(grid: TokenGrid, recipe: Recipe, step: int, rank: int) -> Batch:
    """One process's share: one or two easy-VQA pictures, the rest scenes."""
    size = recipe.joint_batch // recipe.workers
    first = _FIRST_SCENE + (step * recipe.workers + rank) * size
    easy = 1 + (step + rank) % 2
    return scene_batch(grid, "train", recipe.seed, first, size, easy=easy, weights=TRAINING_WEIGHTS)


def _joint_loss(
    trainee: Trainee, recipe: Recipe, batch: Batch, step: int, keep: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, float]]:
    vlm = trainee.vlm
    encoded = vlm.encode(batch.images)
    packed = pack_inputs(vlm, batch, vlm.project(encoded.cells), keep)
    output, inputs = run_decoder(vlm, packed)
    answers, right = answer_loss(*answer_logits(vlm, batch, output, packed.prefix), batch)
    labels, report = label_loss(trainee, encoded, batch)
    loss, mass = answers + recipe.joint_label_weight * labels, 0.0
    compare_weight = recipe.compare_weight * max(0.0, 1 - step / recipe.joint_steps)
    comparing = compare_loss(vlm, batch, packed, inputs)
    verdict = verdict_loss(vlm, batch, packed, inputs)
    loss = loss + compare_weight * (comparing + verdict)
    loss = loss + recipe.place_weight * place_loss(trainee, packed, inputs, keep)
    report |= {"comparing": round(comparing.item(), 3), "verdict": round(verdict.item(), 3)}
    # the reading term fades out over the first half: after that the answers alone decide where to look
    reading_weight = recipe.read_weight * max(0.0, 1 - 2 * step / recipe.joint_steps)
    if reading_weight > 0:
        reading, mass = read_loss(vlm, batch, packed, inputs, keep)
        loss = loss + reading_weight * reading
    return loss, {"answer": round(answers.item(), 3), "right": round(right, 3), "mass": round(mass, 3), **report}


def _train(rank: int, buffer: torch.Tensor, barrier: Any, recipe: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    trainee = Trainee(recipe.model)
    for name in ("vision.pt", "symbolic.pt"):
        trainee.load_state_dict(torch.load(folder / name), strict=False)
    vlm = trainee.vlm
    vlm.compile_layers()
    shared = SharedGradients(buffer, barrier, rank)
    log = CurveLog(folder / "joint.jsonl", enabled=rank == 0)
    _scale_projector(trainee, recipe)
    _align(trainee, recipe, shared, log)
    dev = dev_batches(vlm.grid, 60, recipe.joint_batch // recipe.workers, easy=1) if rank == 0 else []

    def dev_summary() -> dict[str, float]:
        return score(vlm, dev, lambda batch: vlm.see(batch.images)).summary()

    if rank == 0:
        log.write(dev_step=0, **dev_summary())
    answering = (*DECODER_PARTS, *_projector(trainee))
    groups = [
        (_named(trainee, answering), recipe.joint_rate),
        (list(vision_parts(trainee).values()), recipe.joint_rate * recipe.joint_vision_factor),
    ]
    optimizer = Optimizer(groups, shared)
    for step in range(recipe.joint_steps):
        batch, keep = _joint_batch(vlm.grid, recipe, step, rank), None
        if step < recipe.joint_subset_steps:
            keep = choose_patches(batch, np.random.default_rng([recipe.seed, step, rank]), recipe.joint_subset_tokens)
        loss, report = _joint_loss(trainee, recipe, batch, step, keep)
        norm = optimizer.step(loss, cosine(step, recipe.joint_steps, warmup=40))
        last = step == recipe.joint_steps - 1
        if step % 25 == 0 or last:
            log.write(step=step, norm=round(norm, 2), **report)
        if rank == 0 and ((step and step % recipe.evaluate_every == 0) or last):
            log.write(dev_step=step, **dev_summary())
            torch.save({name: weight.detach() for name, weight in vlm.hf.named_parameters()}, folder / "joint.pt")


def train_joint(recipe: Recipe, folder: Path) -> Path:
    """Trains in `recipe.workers` processes of one thread. Returns the file with the model's weights."""
    run_workers(_train, recipe, (recipe, folder))
    return folder / "joint.pt"
