"""AdamW with warm-up and cosine, gradients averaged over processes through shared memory, and a JSONL log."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LOGGER = logging.getLogger(__name__)
_WEIGHT_DECAY = 0.05


class SharedGradients:
    """Averages gradients of `workers` processes on one machine; no network, no process group."""

    def __init__(self, buffer: torch.Tensor, barrier: Any, rank: int) -> None:
        """`buffer`: [workers, at least as many floats as there are parameters] in shared memory."""
        self.buffer, self.barrier, self.rank = buffer, barrier, rank

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replaces every gradient by the mean over the processes; the same bits in each of them."""
        count = sum(parameter.numel() for parameter in parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch.cat([gradient.flatten() for gradient in gradients], out=self.buffer[self.rank, :count])
        self.barrier.wait()
        mean = self.buffer[:, :count].mean(0)
        self.barrier.wait()
        for parameter, chunk in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = chunk.view_as(parameter)


class Optimizer:
    """AdamW over groups of (parameters, peak learning rate)."""

    def __init__(
        self, groups: Iterable[tuple[list[nn.Parameter], float]], shared: SharedGradients | None = None
    ) -> None:
        self.shared = shared
        self.parameters: list[nn.Parameter] = []
        settings = []
        for parameters, rate in groups:
            self.parameters += parameters
            for decayed in (True, False):
                chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decayed]
                decay = _WEIGHT_DECAY if decayed else 0.0
                settings.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay})
        self.adam = torch.optim.AdamW(settings, betas=(0.9, 0.98), fused=True)

    def step(self, loss: torch.Tensor, factor: float) -> float:
        """One update at `factor` of the peak rates. Returns the gradient norm before clipping to 1."""
        loss.backward()
        return self.update(factor)

    def update(self, factor: float) -> float:
        """As `step`, with the gradients that are there."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.shared is not None:
            self.shared.average(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        self.adam.zero_grad()
        return float(norm)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.03) -> float:
    """Linear warm-up, then half a cosine down to `floor`."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


class CurveLog:
    """Appends one JSON object a line; `t` is seconds since the log was opened."""

    def __init__(self, path: Path, enabled: bool = True, append: bool = False) -> None:
        self.path, self.enabled, self.start = path, enabled, time.monotonic()
        if enabled and not append:
            path.write_text("", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Writes one line, unless this process is not the one that logs."""
        if not self.enabled:
            return
        values["t"] = round(time.monotonic() - self.start, 1)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
        _LOGGER.info("%s %s", self.path.stem, values)
