"""What methods with a trained predictor share: where its weights come from, and that they belong to this model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from vtprune.contract import Scorer
from vtprune.errors import CheckpointError, PlanError, UntrainedError
from vtprune.predictors import Fingerprint, Predictor, load_predictor, shipped_weights

__all__ = ["LearnedScorer"]

P = TypeVar("P", bound=Predictor)


@dataclass(frozen=True)
class LearnedScorer(Scorer):
    """A method that reads a trained predictor.

    Attributes:
        weights: folder that `vtprune train` wrote, or a repository on the hub (user/name); None takes those that ship
            for the embedded models.
        check: False also takes weights that were trained for another model of the same depth and width.

    Raises:
        PlanError: if a knob is out of range.
    """

    predictor: ClassVar[type[Predictor]]

    weights: str | None = None
    check: bool = True

    def __post_init__(self) -> None:
        weights: Any = self.weights
        if weights is not None and not (isinstance(weights, str) and weights):
            raise PlanError(f"{self.name} weights must be a folder or a repository's name, got {weights!r}.")
        if not isinstance(self.check, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"{self.name} check must be True or False, got {self.check!r}.")

    @property
    def needs_weights(self) -> bool:
        """Unless a knob replaces the predictor."""
        return True

    def bind(self, model: Any) -> Scorer:
        """The same method with its weights named, found to be of this model, and the knobs that they were trained with.

        Raises:
            UntrainedError: if none were named and none ship for this model.
            CheckpointError: if they cannot be read, or were trained for another model.
            PlanError: if a knob was set to something else than they were trained with.
        """
        if not self.needs_weights:
            return self
        mine = Fingerprint.of(model)
        weights = self.weights or shipped_weights(self.name, mine)
        if weights is None:
            raise UntrainedError(
                f"{self.name} is learned, and has no weights for this model ({mine}). Train them, "
                f"`vtprune train {self.name} --model MODEL --data FILE.jsonl --out DIR`, and name them: "
                f"\"{self.name}(weights='DIR')\"."
            )
        predictor = load_predictor(self.predictor, weights)
        theirs = predictor.fingerprint
        wrong = theirs.differences(mine)
        if not self.check:
            wrong = [f"{n} of {getattr(theirs, n)}" for n in ("layers", "hidden") if vars(theirs)[n] != vars(mine)[n]]
        if wrong:
            raise CheckpointError(
                f"the weights {weights!r} of {self.name} were trained for {theirs}, not for this model ({mine}): they "
                f"differ in {'; '.join(wrong)}. Train your own, or pass check=False to use them on a model of the "
                "same depth and width."
            )
        default = type(self)()
        for name, value in predictor.knobs.items():
            mine = getattr(self, name)
            if mine not in (getattr(default, name), value):
                raise PlanError(
                    f"{self.name} {name} is {mine!r}, but the weights {weights!r} were trained with {value!r}. "
                    "Leave it out, or train others."
                )
        return dataclasses.replace(self, weights=weights, **predictor.knobs)

    def loaded(self, cls: type[P], device: torch.device) -> P:
        """The predictor on `device`.

        Raises:
            UntrainedError: if no weights are named, as before `bind`.
        """
        if self.weights is None:
            raise UntrainedError(f"{self.name} has not been given weights; vtprune.prune() finds or refuses them.")
        return load_predictor(cls, self.weights, device)
