"""Trains the low-rank change in one process; a killed run goes on from its last saved step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vtprune.tiny.exercises.base import LOOKS
from vtprune.tiny.storage import CHANGE_LEVELS
from vtprune.tiny.training.decoder import answer_logits, pack_inputs, run_decoder
from vtprune.tiny.training.losses import answer_loss, read_loss
from vtprune.tiny.training.optimizer import CurveLog, Optimizer, cosine
from vtprune.tiny.training.packing import Batch
from vtprune.tiny.training.plus.lowrank import LowRank
from vtprune.tiny.training.plus.network import OLD_WORDS, View, build
from vtprune.tiny.training.plus.packing import VIEWS, exercise_batch, old_batch
from vtprune.tiny.training.plus.recipe import ORDINAL_LAYER, PlusRecipe
from vtprune.tiny.training.scoring import score
from vtprune.tiny.training.vlms.base import VISION_WIDTH, WIDTH

STATE, CURVE = "plus.pt", "plus.jsonl"
_MOMENTS = 4
# exercises and scenes of the phases are far apart, so that no two phases see the same
_FIRST_TOWER, _FIRST_OLD, _FIRST_OLD_TOWER = 10_000_000, 60_000_000, 70_000_000
DEV_SEED, DEV_SIZE = 123, 12


class Heads(nn.Module):
    """What only training reads: what a token's cells look like, and in which picture or moment it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(VISION_WIDTH * 4, len(LOOKS))
        self.ordinal = nn.Linear(WIDTH, _MOMENTS)


def make_views(model: Any) -> dict[str, View]:
    """The views of one model, by task; tasks that see alike share one."""
    made = {kind: kind(model) for kind in dict.fromkeys(VIEWS.values())}
    return {task: made[kind] for task, kind in VIEWS.items()}


def training_batch(task: str, recipe: PlusRecipe, step: int, *, tower: bool = False) -> Batch:
    """One task's part of a step."""
    # exercises are numbered by the pictures of the first steps; later steps may take more or fewer
    most = max(sizes.get(task, 0) for sizes in (recipe.pictures, recipe.later_pictures, recipe.tower_pictures))
    sizes = recipe.tower_pictures if tower else recipe.pictures if step < recipe.tower_at else recipe.later_pictures
    stride = recipe.pictures[task] if step < recipe.tower_at and not tower else most
    first = step * stride
    if task == "scenes":
        first += _FIRST_OLD_TOWER if tower else _FIRST_OLD
        return old_batch("train", recipe.seed, first, sizes[task], easy=step % 2)
    return exercise_batch(task, "train", recipe.seed, first + (_FIRST_TOWER if tower else 0), sizes[task])


def _look_loss(view: View, heads: Heads, cells: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of what each token shows; ground counts less."""
    weight = torch.ones(len(LOOKS))
    weight[0] = 0.15
    wanted = labels[:, 0, torch.from_numpy(view.grid.visual)].flatten()
    return functional.cross_entropy(heads.look(cells).flatten(0, 1), wanted, weight)


def batch_loss(
    view: View, heads: Heads, batch: Batch, recipe: PlusRecipe, step: int, labelled: bool
) -> tuple[torch.Tensor, float, float]:
    """(loss, share of answer words that are right, attention mass on what is asked about)."""
    seen = view.look(batch.images)
    packed = pack_inputs(view, batch, seen.tokens)
    output, inputs = run_decoder(view, packed)
    loss, right = answer_loss(*answer_logits(view, batch, output, packed.prefix), batch)
    if not labelled:
        return loss, right, 0.0
    labels = torch.from_numpy(batch.labels)
    loss = loss + recipe.look_weight * _look_loss(view, heads, seen.cells, labels)
    if view.grid.frames > 1:
        places = torch.from_numpy(view.grid.visual)
        hidden = view.decoder.norm(inputs[ORDINAL_LAYER][:, packed.before + places])
        ordinals = functional.cross_entropy(heads.ordinal(hidden).flatten(0, 1), labels[:, 1, places].flatten())
        loss = loss + recipe.ordinal_weight * ordinals
    # fades out over the first two thirds: after that the answers alone decide where to look
    fading = recipe.read_weight * max(0.0, 1 - 1.5 * step / recipe.schedule)
    reading, mass = read_loss(view, batch, packed, inputs)
    return loss + fading * reading, right, mass


def dev_batches(size: int = DEV_SIZE) -> dict[str, list[Batch]]:
    """Dev exercises and scenes of the seed that training looks at."""
    return {
        task: [old_batch("dev", DEV_SEED, 0, size, 2)]
        if task == "scenes"
        else [exercise_batch(task, "dev", DEV_SEED, 0, size)]
        for task in VIEWS
    }


def accuracy(views: dict[str, View], batches: dict[str, list[Batch]]) -> dict[str, float]:
    """Percent right by kind of question."""
    table: dict[str, float] = {}
    for task, part in batches.items():
        summary = score(views[task], part, lambda batch, view=views[task]: view.look(batch.images).tokens).summary()
        table |= {kind: value for kind, value in summary.items() if kind != "scenes" or task == "scenes"}
    return table


class Run:
    """All that a training run holds, and how it is saved; a folder that holds a saved run is gone on with."""

    def __init__(self, recipe: PlusRecipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.state = recipe, folder / STATE
        self.model = build()
        self.change = LowRank(self.model, len(OLD_WORDS), recipe.tower_rank, recipe.decoder_rank)
        self.heads, self.views = Heads(), make_views(self.model)
        parts = [(self.change.parameters(), recipe.rate), (list(self.heads.parameters()), recipe.rate)]
        self.optimizer = Optimizer(parts)
        self.step, self.tower_step = 0, 0
        if self.state.is_file():
            saved = torch.load(self.state)
            self.step, self.tower_step = saved["step"], saved.get("tower_step", 0)
            self.change.load(saved["change"])
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.adam.load_state_dict(saved["adam"])
        self.log = CurveLog(folder / CURVE, append=bool(self.step))

    def compile(self) -> None:
        """Compile blocks and layers, each on its own; every task has shapes of its own, with the tower alone others."""
        torch._dynamo.config.recompile_limit = 32
        for view in dict.fromkeys(self.views.values()):
            view.compile_blocks()
        for layer in self.views["scenes"].decoder.layers:
            layer.compile(dynamic=False)

    def save(self) -> None:
        """Write the state in one go."""
        kept = {"step": self.step, "tower_step": self.tower_step, "change": dict(self.change.stored())}
        partial = self.state.with_suffix(".part")
        torch.save({**kept, "heads": self.heads.state_dict(), "adam": self.optimizer.adam.state_dict()}, partial)
        partial.replace(self.state)

    def train_tower(self) -> None:
        """The tower alone learns what tokens show; what it makes of scenes is held. Not saved on the way."""
        recipe, views, heads = self.recipe, self.views, self.heads
        self.change.write()
        still = copy.deepcopy(self.model.model.visual).requires_grad_(False)
        chosen = [factor for name, pair in self.change.factors.items() if "visual" in name for factor in pair]
        optimizer = Optimizer([(chosen, recipe.tower_rate), (list(heads.look.parameters()), recipe.tower_rate)])
        for step in range(recipe.tower_steps):
            self.change.write()
            report = {}
            for task in recipe.tower_pictures:
                view, batch = views[task], training_batch(task, recipe, step, tower=True)
                cells = view.cells(batch.images)
                if task == "scenes":
                    loss = recipe.hold_weight * functional.mse_loss(cells, view.cells(batch.images, still))
                else:
                    cells = cells.reshape(len(batch.images), -1, cells.shape[-1])
                    loss = _look_loss(view, heads, cells, torch.from_numpy(batch.labels))
                loss.backward()
                report[task] = round(loss.item(), 3)
            self.change.read()
            optimizer.update(cosine(step, recipe.tower_steps, recipe.warmup))
            if step % 10 == 0 or step == recipe.tower_steps - 1:
                self.log.write(tower_step=step, **report)
        self.optimizer.adam.zero_grad()
        self.tower_step = recipe.tower_steps
        self.save()

    def train_together(self) -> float:
        """One step of everything. Returns the gradient norm; the log gets a line every ten steps."""
        recipe, step, report = self.recipe, self.step, {}
        rounding = step >= recipe.rounded_from
        self.change.levels = CHANGE_LEVELS if rounding else 0
        self.change.write()
        for task, view in self.views.items():
            batch = training_batch(task, recipe, step)
            loss, right, mass = batch_loss(view, self.heads, batch, recipe, step, task != "scenes")
            (loss / len(self.views)).backward()
            report[task] = (round(loss.item(), 3), round(right, 3), round(mass, 3))
        self.change.read()
        falling = (recipe.steps - step) / (recipe.steps - recipe.rounded_from) if rounding else 1.0
        norm = self.optimizer.update(falling * cosine(step, recipe.schedule, recipe.warmup))
        if step % 10 == 0 or step == recipe.steps - 1:
            self.log.write(step=step, norm=round(norm, 2), **report)
        return norm


def train_plus(recipe: PlusRecipe, folder: Path) -> Path:
    """Trains with one thread. Returns the file with the factors and all that a killed run needs to go on."""
    run = Run(recipe, folder)
    run.compile()
    dev = dev_batches()
    while run.step < recipe.steps:
        if run.step >= recipe.tower_at and not run.tower_step:
            run.train_tower()
        run.train_together()
        run.step += 1
        last = run.step == recipe.steps
        if run.step % recipe.evaluate_every == 0 or last:
            run.change.write()
            # shapes that occur here only are not worth compiling
            with torch.compiler.set_stance("force_eager"):
                run.log.write(dev_step=run.step, **accuracy(run.views, dev))
        if run.step % recipe.save_every == 0 or last:
            run.save()
    return run.state
