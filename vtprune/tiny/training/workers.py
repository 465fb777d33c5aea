"""Several training processes on one machine that average their gradients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.recipe import Recipe


def _work_apart(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    # processes that compile the same kernel into one cache read each other's half-written libraries
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"vtprune_inductor_{rank}"))
    work(rank, *arguments)


def run_workers(work: Callable[..., None], recipe: Recipe, arguments: tuple[Any, ...]) -> None:
    """Runs `work(rank, buffer, barrier, *arguments)` in `recipe.workers` processes and waits for all of them."""
    parameters = sum(weight.numel() for weight in Trainee(recipe.model).parameters())
    buffer = torch.zeros(recipe.workers, parameters).share_memory_()
    barrier = multiprocessing.get_context("spawn").Barrier(recipe.workers)
    spawn(_work_apart, args=(work, buffer, barrier, *arguments), nprocs=recipe.workers)
