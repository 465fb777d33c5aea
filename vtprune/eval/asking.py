"""Small pieces of asking a model a question: attach a method, read the task's settings, cut the answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

import vtprune
from vtprune.budget import parse_keep
from vtprune.errors import InputError
from vtprune.plan import Plan
from vtprune.stopwatch import timer

__all__ = [
    "UNPRUNED",
    "PrefillClock",
    "attach_to",
    "cut_answer",
    "default_device",
    "generation_arguments",
    "image_token",
    "read_batch_size",
]

UNPRUNED = "none"
"""Value of `method=` that attaches nothing."""

_DEFAULT_NEW_TOKENS = 128


class PrefillClock(LogitsProcessor):
    """Times the prefill inside `generate`: the first logits that it is shown are those of the first new token.

    Attributes:
        milliseconds: since the clock was made; 0.0 until the first logits came.
    """

    def __init__(self) -> None:
        self._start = timer()
        self.milliseconds = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are."""
        if not self.milliseconds:
            self.milliseconds = 1000 * (timer() - self._start)
        return scores


def attach_to(
    model: Any,
    method: str | Plan,
    keep: int | float | str | None = None,
    *,
    basis: str = "average",
    flops: float | None = None,
) -> Any:
    """`vtprune.prune` with the spelling of model arguments: `none`, and several budgets joined by `+`.

    `flowcut+fastv` with `288+64` is `flowcut@288+fastv` with 64 (see `vtprune.specs`).
    """
    if method == UNPRUNED:
        return None
    if isinstance(method, Plan):
        return vtprune.prune(model, method)
    budget: Any = keep
    if isinstance(keep, str):
        parts = [parse_keep(part) for part in keep.split("+")]
        budget = parts if len(parts) > 1 else parts[0]
    return vtprune.prune(model, method, budget, basis=basis, flops=flops)


def read_batch_size(given: int | str) -> int:
    """lmms-eval hands the batch size over as text.

    Raises:
        InputError: if it is not an int >= 1.
    """
    if not str(given).isdecimal() or int(given) < 1:
        raise InputError(f"batch_size must be an int >= 1, got {given!r} ('auto' is not supported).")
    return int(given)


def default_device() -> str:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def image_token(config: Any) -> int:
    """Id of the placeholder that stands for one visual token.

    Raises:
        InputError: if the config names none.
    """
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise InputError(f"the config {type(config).__name__} names no image token, so visual tokens cannot be counted.")


def generation_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The task's settings in the words of `generate`; greedy unless the task asks for a temperature."""
    temperature = settings.get("temperature") or 0
    sample = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    return {
        "max_new_tokens": settings.get("max_new_tokens", _DEFAULT_NEW_TOKENS),
        "num_beams": settings.get("num_beams", 1),
        "do_sample": sample,
        # None silences the warning about sampling settings that a checkpoint carries along
        "temperature": temperature if sample else None,
        "top_p": settings.get("top_p") if sample else None,
        "top_k": settings.get("top_k") if sample else None,
    }


def cut_answer(text: str, until: str | Sequence[str] | None) -> str:
    """The answer before the first stop string, stripped."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
