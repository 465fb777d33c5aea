"""Run by `accelerate launch` or plain Python: trains and labels a toy, and writes what this process ended with.

python tests/two_processes.py FOLDER [KILL_AT]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vtprune.train.data import Example
from vtprune.train.loop import LoopConfig, LoopResult, train_loop
from vtprune.train.store import label

SAMPLES, HELD_OUT = 23, 8
CONFIG = LoopConfig(epochs=3, batch_size=5, lr=0.05, warmup=0.2, patience=None, save_every=2, log_every=2)
_DRAWS = torch.Generator().manual_seed(0)
INPUTS = torch.randn(SAMPLES + HELD_OUT, 4, generator=_DRAWS)
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3


class Toy(nn.Module):
    """Two layers, one that nothing uses, and a buffer that every process fills for itself."""

    seen: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, places: Sequence[int]) -> Tensor:
        """Mean squared error of these samples."""
        if self.training:
            self.seen += len(places)
        return (self.layers(INPUTS[list(places)])[:, 0] - TARGETS[list(places)]).square().mean()

    def held_out(self) -> dict[str, float]:
        """Loss and largest error of the samples that are not trained on."""
        error = (self.layers(INPUTS[SAMPLES:])[:, 0] - TARGETS[SAMPLES:]).abs()
        return {"loss": error.square().mean().item(), "largest": error.max().item()}


def run(folder: Path, toy: Toy, config: LoopConfig = CONFIG, **options: object) -> LoopResult:
    """Train the toy in `folder`."""
    return train_loop(toy, SAMPLES, toy.loss, toy.held_out, config, folder, **options)  # type: ignore[arg-type]


def make(batch: list[Example]) -> dict[str, Tensor | list[Tensor]]:
    """A number and a row of that many ones for each example."""
    numbers = [int(example.key) for example in batch]
    return {"number": torch.tensor(numbers), "row": [torch.ones(number) for number in numbers]}


def examples(count: int) -> list[Example]:
    """Examples 0, 1, 2, ..."""
    return [Example(str(number), (), "why?", "so") for number in range(count)]


def main() -> None:
    folder, kill_at = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    rank = int(os.environ.get("RANK", "0"))
    toy, real, calls = Toy(), Toy.loss, []
    if rank:
        # every process starts from the first one's weights
        nn.init.zeros_(toy.layers[0].weight)  # type: ignore[arg-type]

    def loss(self: Toy, places: Sequence[int]) -> Tensor:
        calls.append(list(places))
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, places)

    Toy.loss = loss  # type: ignore[method-assign]
    result = run(folder / "run", toy)
    labels = label(examples(7), 2, make, folder / "labels")
    weights = {name: value.clone() for name, value in toy.state_dict().items()}
    torch.save({"weights": weights, "result": result, "labels": labels, "calls": calls}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
