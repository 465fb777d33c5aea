"""Several training processes on one machine that average their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.recipe import Recipe


def run_workers(work: Callable[..., None], recipe: Recipe, arguments: tuple[Any, ...]) -> None:
    """Runs `work(rank, buffer, barrier, *arguments)` in `recipe.workers` processes and waits for all of them."""
    parameters = sum(weight.numel() for weight in Trainee().parameters())
    buffer = torch.zeros(recipe.workers, parameters).share_memory_()
    barrier = multiprocessing.get_context("spawn").Barrier(recipe.workers)
    spawn(work, args=(buffer, barrier, *arguments), nprocs=recipe.workers)
