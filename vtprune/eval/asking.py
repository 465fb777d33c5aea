"""Small pieces of asking a model a question: attach a method, read the task's settings, cut the answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor

import vtprune
from vtprune.budget import parse_keep
from vtprune.errors import InputError
from vtprune.plan import Plan
from vtprune.prompt import Question, plain_media, read_video
from vtprune.stopwatch import timer
from vtprune.videos import Video

__all__ = [
    "UNPRUNED",
    "Message",
    "PrefillClock",
    "Prompt",
    "Request",
    "attach_to",
    "cut_answer",
    "default_device",
    "generation_arguments",
    "media_arguments",
    "read_batch_size",
    "read_medium",
    "visual_tokens",
]

UNPRUNED = "none"
"""Value of `method=` that attaches nothing."""

_DEFAULT_NEW_TOKENS = 128
# of films that come as frames alone; the usual rate at which they are cut into frames
_FRAMES_A_SECOND = 2.0


Message = dict[str, Any]
Prompt = tuple[str, Sequence[Any]]


class Request(NamedTuple):
    """One question: what makes its prompt (text, media), the task's generation settings, where it is from."""

    make: Callable[[], Prompt]
    settings: dict[str, Any]
    task: str
    doc_id: int


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


def visual_tokens(config: Any, input_ids: torch.Tensor) -> list[int]:
    """How many placeholders of images and of videos stand in each row of `input_ids` [B, L].

    Raises:
        InputError: if the config names no image token.
    """
    marks = [getattr(config, f"{kind}_token_{end}", None) for kind in ("image", "video") for end in ("id", "index")]
    if marks[0] is None and marks[1] is None:
        raise InputError(
            f"the config {type(config).__name__} names no image token, so visual tokens cannot be counted."
        )
    known = torch.tensor([mark for mark in marks if mark is not None], device=input_ids.device)
    return torch.isin(input_ids, known).sum(1).tolist()


def read_medium(model: Any, processor: Any, medium: Any) -> Any:
    """What a task shows, as an image or as a `Video`: the path of a film is read, a list is taken for its frames.

    Raises:
        InputError: if there are frames or a film, and the model reads none.
    """
    is_path = isinstance(medium, (str, Path))
    if not is_path and not isinstance(medium, (list, tuple, Video)):
        return medium
    if getattr(processor, "video_processor", None) is None:
        raise InputError(
            f"{type(model).__name__} reads no videos; leave out the task or take a model such as Qwen2-VL."
        )
    if is_path:
        return read_video(model, Path(medium))
    return medium if isinstance(medium, Video) else Video(tuple(medium), _FRAMES_A_SECOND)


def media_arguments(media: Sequence[Any]) -> dict[str, Any]:
    """Images and `Video`s of a batch, in order, in a processor's words."""
    films = tuple(medium for medium in media if isinstance(medium, Video))
    return plain_media([Question("", tuple(m for m in media if not isinstance(m, Video)), films)])


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
