"""Prefill time of every cell against the unpruned model, all in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vtprune.bench.measure import shared_copy
from vtprune.bench.timing import Timing, interleaved_medians
from vtprune.eval.asking import UNPRUNED

__all__ = ["prefill_timings"]


def prefill_timings(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Mapping[str, Callable[[Any], Any]],
    rounds: int,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time one prefill (tower included) of each cell and of the bare model on the same batch.

    The callables take turns, so that drift of the machine meets all of them; sessions are attached beforehand.

    Args:
        model: the unpruned model, with nothing attached.
        inputs: one batch.
        cells: name to a function that prunes the model it is given and returns the session.
        rounds: measurements of each.
        progress: called with the name after every prefill.

    Returns:
        timings by name, the unpruned model's under `none`.
    """

    def prefill(of: Any) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> object:
            return of(**inputs, use_cache=True, logits_to_keep=1)

        return run

    runs = {UNPRUNED: prefill(model)}
    sessions = []
    try:
        for name, attach in cells.items():
            twin = shared_copy(model)
            sessions.append(attach(twin))
            runs[name] = prefill(twin)
        return interleaved_medians(runs, rounds=rounds, warmup=1, progress=progress)
    finally:
        for session in sessions:
            session.remove()
