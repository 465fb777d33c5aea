"""Draws an example of each ability task: `python docs/task_figures.py` writes `docs/assets/task_*.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vtprune.tiny.exercises import TASKS, exercise

_ASSETS = Path(__file__).parent / "assets"
_INDEX, _SCALE, _GAP = 1, 2, 4


def draw(task: str) -> Image.Image:
    """The pictures of one dev exercise side by side; of a film every second frame."""
    item = exercise(task, "dev", 0, _INDEX)
    frames = item.frames[:: 2 if item.is_film else 1]
    padded = [np.pad(frame, ((0, 0), (0, _GAP), (0, 0)), constant_values=255) for frame in frames]
    strip = Image.fromarray(np.concatenate(padded, 1)[:, :-_GAP])
    large = strip.resize((strip.width * _SCALE, strip.height * _SCALE), Image.Resampling.NEAREST)
    return large.quantize(128)


def main() -> None:
    """Writes all pictures."""
    for task in TASKS:
        draw(task).save(_ASSETS / f"task_{task}.png", optimize=True)


if __name__ == "__main__":
    main()
