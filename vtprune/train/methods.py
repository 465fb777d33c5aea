"""The trainers by method, and the settings that each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vtprune.errors import InputError, PlanError, UnknownNameError
from vtprune.specs import parse_knobs
from vtprune.train.atp import AtpConfig, train_atp
from vtprune.train.dyvte import DyvteConfig, train_dyvte
from vtprune.train.loop import LoopResult
from vtprune.train.relevance import RelevanceConfig, train_relevance

__all__ = ["TRAINERS", "Trainer", "read_trainer"]


@dataclass(frozen=True)
class Trainer:
    """How a method is trained.

    Attributes:
        config: its settings, a dataclass with a field `loop`.
        train: (model, processor, train, held_out, out, config, progress, dtype) -> LoopResult.
    """

    config: type[Any]
    train: Callable[..., LoopResult]


TRAINERS = {
    "atp": Trainer(AtpConfig, train_atp),
    "dyvte": Trainer(DyvteConfig, train_dyvte),
    "relevance": Trainer(RelevanceConfig, train_relevance),
}


def _known(name: str) -> Trainer:
    if name not in TRAINERS:
        raise UnknownNameError("learned method", name, TRAINERS)
    return TRAINERS[name]


def read_trainer(text: str, loop: Mapping[str, Any]) -> tuple[str, Trainer, Any]:
    """`dyvte(width=8)` -> the method's name, its trainer and its settings.

    Args:
        text: a learned method, with settings of its trainer if need be.
        loop: settings of the loop that differ from the method's own.

    Raises:
        UnknownNameError: if it has no trainer.
        PlanError: if the text is malformed, or a setting is not one of the trainer's.
        InputError: if a value is out of range.
    """
    name, knobs = parse_knobs(text, _known)
    trainer = TRAINERS[name]
    legal = {field.name for field in dataclasses.fields(trainer.config)} - {"loop"}
    if not set(knobs) <= legal:
        raise PlanError(
            f"the trainer of {name} has the settings {sorted(legal)}, got {sorted(set(knobs) - legal)} beside them."
        )
    knobs = {key: tuple(value) if isinstance(value, list) else value for key, value in knobs.items()}
    try:
        config = trainer.config(**knobs)
        return name, trainer, dataclasses.replace(config, loop=dataclasses.replace(config.loop, **loop))
    except TypeError as error:
        raise InputError(f"a setting of {text!r} is of the wrong type: {error}.") from error
