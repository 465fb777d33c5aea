"""Settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtprune.errors import InputError

__all__ = ["LoopConfig"]


@dataclass(frozen=True)
class LoopConfig:
    """How `train_loop` trains. AdamW, linear warm-up, then a cosine down to zero.

    Attributes:
        epochs: passes over the training samples at most.
        batch_size: samples a step, over all processes together.
        lr: largest learning rate.
        weight_decay: of tensors with two axes or more; biases, norms and thresholds do not decay.
        warmup: share of the steps over which the learning rate rises.
        patience: epochs without a smaller held-out loss after which training stops; None for never.
        seed: of the order of the samples, and of random numbers that a loss draws.
        max_grad_norm: longer gradients are shortened to this; None for never.
        micro_batch: samples of a process that pass through `loss` together; None for all. It saves memory, and changes
            nothing else for a loss that is a mean over its samples.
        save_every: steps between two stored states, None for once an epoch.
        log_every: steps between two rows of the log; the end of an epoch always writes one.

    Raises:
        InputError: if a value is out of range.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    patience: int | None = 3
    seed: int = 0
    max_grad_norm: float | None = 1.0
    micro_batch: int | None = None
    save_every: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every"):
            self._require(name, "an int >= 1", lambda value: value >= 1, whole=True)
        for name in ("patience", "micro_batch", "save_every"):
            if getattr(self, name) is not None:
                self._require(name, "an int >= 1, or None", lambda value: value >= 1, whole=True)
        self._require("seed", "an int >= 0", lambda value: value >= 0, whole=True)
        self._require("lr", "a number above 0", lambda value: value > 0)
        self._require("weight_decay", "a number >= 0", lambda value: value >= 0)
        self._require("warmup", "a share in [0, 1]", lambda value: 0 <= value <= 1)
        if self.max_grad_norm is not None:
            self._require("max_grad_norm", "a number above 0, or None", lambda value: value > 0)

    def _require(self, name: str, legal: str, test: Callable[[Any], bool], whole: bool = False) -> None:
        value = getattr(self, name)
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not test(value):
            raise InputError(f"{name} must be {legal}, got {value!r}.")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step.

        Args:
            step: from 0.
            steps: of the whole run.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
