"""A low-rank change of a model's matrices, and what it takes to store and to train it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vtprune.tiny.storage import DOWN, ROWS, UP, round_rows

_TOWER = "model.visual."


class LowRank:
    """`weight = base + up^T down` for every matrix of tower, merger and decoder, and new rows of the word tables.

    The model's own parameters always hold the changed weights, so that it runs as it will ship; `write` sets them,
    `read` turns their gradients into those of the factors.

    Attributes:
        factors: name of a matrix -> (down [rank, in], up [rank, out]); filters are flattened.
        rows: name of a word table -> its new rows.
        levels: whole numbers to either side of zero that a stored factor has; 0 while it is not rounded.
    """

    def __init__(self, model: Any, old_words: int, tower_rank: int, decoder_rank: int) -> None:
        self.levels = 0
        self.base: dict[str, torch.Tensor] = {}
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.rows: dict[str, nn.Parameter] = {}
        self._weights: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            if weight.ndim < 2:
                continue
            self._weights[name] = weight.requires_grad_()
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                self.rows[name] = nn.Parameter(weight[old_words:].detach().clone())
                continue
            self.base[name] = weight.detach().clone()
            rank = tower_rank if name.startswith(_TOWER) else decoder_rank
            fan_in = weight[0].numel()
            down = nn.Parameter(torch.randn(rank, fan_in) * fan_in**-0.5)
            self.factors[name] = (down, nn.Parameter(torch.zeros(rank, len(weight))))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [*(factor for pair in self.factors.values() for factor in pair), *self.rows.values()]

    def _stored(self, factor: torch.Tensor) -> torch.Tensor:
        return round_rows(factor, self.levels) if self.levels else factor

    @torch.no_grad()
    def write(self) -> None:
        """Set the model's weights from the factors, as stored."""
        for name, (down, up) in self.factors.items():
            change = self._stored(up).T @ self._stored(down)
            self._weights[name].copy_(self.base[name] + change.view_as(self.base[name]))
        for name, rows in self.rows.items():
            self._weights[name][-len(rows) :].copy_(rows)

    @torch.no_grad()
    def read(self) -> None:
        """Take the gradients that lie on the model's weights; rounding is passed straight through."""
        for name, (down, up) in self.factors.items():
            gradient = self._weights[name].grad
            if gradient is None:
                continue
            flat = gradient.flatten(1)
            up.grad, down.grad = self._stored(down) @ flat.T, self._stored(up) @ flat
        for name, rows in self.rows.items():
            gradient = self._weights[name].grad
            rows.grad = None if gradient is None else gradient[-len(rows) :].clone()
        for weight in self._weights.values():
            weight.grad = None

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of everything that ships, in the words of `vtprune.tiny.storage.apply_change`."""
        for name, (down, up) in self.factors.items():
            yield name + DOWN, down.detach()
            yield name + UP, up.detach()
        for name, rows in self.rows.items():
            yield name + ROWS, rows.detach()

    def load(self, stored: dict[str, torch.Tensor]) -> None:
        """Take the values that `stored` gave."""
        with torch.no_grad():
            for name, value in self.stored():
                value.copy_(stored[name])
