"""Phase 1: the tower alone learns the renderer's labels: kind, colour, region, centre by token, names by picture."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.tiny.training.losses import label_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, cosine
from vtprune.tiny.training.packing import scene_batch
from vtprune.tiny.training.recipe import Recipe

_LABEL_HEADS = ("patch_", "class_names")
# scene numbers of the phases are far apart, so that no two phases see the same scene
_FIRST_SCENE = 0


def vision_parts(trainee: Trainee) -> dict[str, torch.nn.Parameter]:
    """Weights of the vision side and of the label heads."""
    prefixes = (*(f"vlm.hf.{name}" for name in trainee.vlm.vision), *_LABEL_HEADS)
    return {name: weight for name, weight in trainee.named_parameters() if name.startswith(prefixes)}


def train_vision(recipe: Recipe, folder: Path) -> Path:
    """Trains on dense scenes with one thread. Returns the file with the weights of this phase."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    trainee = Trainee(recipe.model)
    trainee.vlm.compile_layers()
    log = CurveLog(folder / "vision.jsonl")
    chosen, grid = vision_parts(trainee), trainee.vlm.grid
    optimizer = Optimizer([(list(chosen.values()), recipe.vision_rate)])
    size, steps = recipe.vision_batch, recipe.vision_steps
    for step in range(steps):
        first = _FIRST_SCENE + step * size
        batch = scene_batch(grid, "train", recipe.seed, first, size, easy=recipe.vision_easy, dense=True, questions=0)
        loss, report = label_loss(trainee, trainee.vlm.encode(batch.images), batch)
        norm = optimizer.step(loss, cosine(step, steps, warmup=100))
        if step % 25 == 0 or step == steps - 1:
            log.write(step=step, loss=round(loss.item(), 3), norm=round(norm, 2), **report)
    target = folder / "vision.pt"
    torch.save({name: weight.detach() for name, weight in chosen.items()}, target)
    return target
