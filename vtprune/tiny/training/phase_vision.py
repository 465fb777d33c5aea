"""Phase 1: the ViT alone learns the renderer's labels (kind, colour, region, centre by patch; names at CLS)."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.tiny.training.decoder import encode_images
from vtprune.tiny.training.losses import label_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, cosine
from vtprune.tiny.training.packing import scene_batch
from vtprune.tiny.training.recipe import Recipe

VISION_PARTS = ("llava.model.vision_tower", "patch_", "class_names")
# scene numbers of the phases are far apart, so that no two phases see the same scene
_FIRST_SCENE = 0


def train_vision(recipe: Recipe, folder: Path) -> Path:
    """Trains on dense scenes with one thread. Returns the file with the weights of this phase."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    trainee = Trainee()
    trainee.compile_layers()
    log = CurveLog(folder / "vision.jsonl")
    scene = _FIRST_SCENE
    for steps, rate in recipe.vision_cycles:
        _cycle(trainee, recipe, (steps, rate), scene, log)
        scene += steps * recipe.vision_batch
    target = folder / "vision.pt"
    torch.save({n: w.detach() for n, w in trainee.named_parameters() if n.startswith(VISION_PARTS)}, target)
    return target


def _cycle(trainee: Trainee, recipe: Recipe, cycle: tuple[int, float], scene: int, log: CurveLog) -> None:
    """One cosine cycle of (steps, peak rate), on scenes from number `scene` on."""
    steps, rate = cycle
    chosen = [weight for name, weight in trainee.named_parameters() if name.startswith(VISION_PARTS)]
    optimizer = Optimizer([(chosen, rate)])
    for step in range(steps):
        first = scene + step * recipe.vision_batch
        batch = scene_batch("train", recipe.seed, first, recipe.vision_batch, dense=True, questions=0)
        loss, report = label_loss(trainee, encode_images(trainee.llava, batch.images), batch)
        norm = optimizer.step(loss, cosine(step, steps, warmup=100))
        if step % 25 == 0 or step == steps - 1:
            done = (first - _FIRST_SCENE) // recipe.vision_batch
            log.write(step=done, loss=round(loss.item(), 3), norm=round(norm, 2), **report)
