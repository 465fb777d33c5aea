"""What the bench has to know about another library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import Tensor

from vtprune.bench.measure import Started

__all__ = ["Inputs", "Rival", "installed_version", "visual_tokens", "why_not"]

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rival:
    """One library.

    Attributes:
        name: on PyPI, and of its top-level package.
        requires: versions that the adapter drives, such as ">=0.1,<0.2".
        install: how to get it beside vtprune.
        does: what it does, in one line.
        budget: what its budget counts, and how ours is expressed in it.
        notes: what a reader of its rows has to know.
        flop_ratio: FLOPs of its prefill as a share of the unpruned ones; None if that is not counted.
        refuses: (model, inputs) -> why it does not serve them, or None.
        attach: (model, inputs, visual tokens to keep a sample) -> a context in which the callable it gives runs one
            prefill. The model is a module tree of the bench's own; anything process-wide is undone on leaving.
    """

    name: str
    requires: str
    install: str
    does: str
    budget: str
    notes: tuple[str, ...]
    flop_ratio: float | None
    refuses: Callable[[Any, Inputs], str | None]
    attach: Callable[[Any, Inputs, int], AbstractContextManager[Callable[[], Started]]]


def installed_version(rival: Rival) -> str | None:
    """Its version; "unknown" for a source tree without metadata, None if there is no such package."""
    try:
        return importlib.metadata.version(rival.name)
    except importlib.metadata.PackageNotFoundError:
        return None if importlib.util.find_spec(rival.name) is None else "unknown"


def visual_tokens(model: Any, inputs: Inputs) -> list[int]:
    """Of each sample."""
    return (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()


def why_not(rival: Rival, version: str | None, model: Any, inputs: Inputs) -> str | None:
    """Why it cannot be timed on this model and batch, as far as that shows before it is imported; None if it can."""
    if version is None:
        return f"not installed: {rival.install}"
    if version != "unknown" and not SpecifierSet(rival.requires).contains(version, prereleases=True):
        return f"version {version} is installed, the bench drives {rival.requires}: {rival.install}"
    if len(set(visual_tokens(model, inputs))) > 1 or not bool(inputs["attention_mask"].all()):
        return "the samples differ in length, and it knows no padding"
    return rival.refuses(model, inputs)
