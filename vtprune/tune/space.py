"""The search space: which methods, alone or one behind another, with which knobs, spending how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, Scorer
from vtprune.errors import InputError, VtpruneError
from vtprune.plan import Plan
from vtprune.tune.knobs import Knob, Trial, knobs_of, own_fields

__all__ = ["Candidate", "Space", "method_text"]

_EARLY, _LATE = ("vision", "input", "restart"), ("restart", "layer")
_NOBODY = "none"


def method_text(method: Scorer) -> str:
    """A method as people write it, with the knobs that are not the default: `fastv(layer=3)`.

    Where a predictor's weights lie is left out: a plan carries it.
    """
    default = type(method)()
    mine = own_fields(method)
    changed = {name: getattr(method, name) for name in mine if getattr(method, name) != getattr(default, name)}
    return method.name + (f"({', '.join(f'{k}={v!r}' for k, v in changed.items())})" if changed else "")


@dataclass(frozen=True)
class Candidate:
    """What a trial tries.

    Attributes:
        methods: one, or two in order.
        split: of two, how much of the cut the second one makes, in [0, 1].
        share: FLOPs to spend, of the unpruned decoder prefill.
    """

    methods: tuple[Scorer, ...]
    split: float
    share: float

    @property
    def text(self) -> str:
        """`flowcut+fastv(layer=3)`."""
        return "+".join(method_text(method) for method in self.methods)


class Space:
    """The methods that run on one model, and their knobs.

    Args:
        names: of registered methods.
        geometry: the model, with the prompt that plans are solved on.
        bind: the method as it runs on the model; raises if it is learned and has no weights for it.
        attach: prunes the model by a plan and takes it off again; raises if the model cannot be pruned so.
        low, high: FLOPs that a candidate may spend; the same number fixes it.

    Attributes:
        singles: every method that runs here, with its default knobs.
        skipped: why the others do not, by name.
        early, late: names of those that can come first and second in a chain.

    Raises:
        InputError: if none of them runs on this model.
        UnknownNameError: if one is not registered.
    """

    def __init__(
        self,
        names: Sequence[str],
        geometry: Geometry,
        bind: Callable[[Scorer], Scorer],
        attach: Callable[[Plan], object],
        low: float,
        high: float,
    ) -> None:
        self._geometry, self._attach, self.low, self.high = geometry, attach, low, high
        self.singles: dict[str, Scorer] = {}
        self.skipped: dict[str, str] = {}
        self.early, self.late = [], []
        self._knobs: dict[str, list[Knob]] = {}
        for name in names:
            method = METHODS[name]()
            try:
                method = bind(method)
                sites = [stage.site.kind for stage in self._tried(method).stages]
            except VtpruneError as error:
                self.skipped[name] = str(error)
                continue
            self.singles[name] = method
            self.early += [name] * (sites[0] in _EARLY)
            self.late += [name] * (sites[-1] in _LATE)
            self._knobs[name] = knobs_of(method, geometry.layers, lambda other: bool(self._tried(other).stages))
        if not self.singles:
            raise InputError(f"none of the methods runs on this model: {self.skipped}.")

    def _tried(self, method: Scorer) -> Plan:
        """The method's plan for half of the tokens, attached to the model to see whether it can be."""
        half = Budget(max(1, self._geometry.visual_tokens // 2), "final") if method.takes_budget else Budget(None)
        plan = method.plan(self._geometry, half)
        self._attach(plan)
        return plan

    def stock(self, share: float) -> list[dict[str, Any]]:
        """Parameters of every single method as it comes, at this share; what a search begins with."""
        spend = {"share": share} if self.low < self.high else {}
        return [
            {
                **spend,
                "first": name,
                **({f"{name}.stock": True} if self._knobs[name] else {}),
                **({"second": _NOBODY} if self._can_lead(name) else {}),
            }
            for name in self.singles
        ]

    def _can_lead(self, name: str) -> bool:
        """Another method can come behind it."""
        return name in self.early and any(other != name for other in self.late)

    def draw(self, trial: Trial) -> Candidate:
        """A candidate; which parameters there are depends on the methods drawn."""
        share = trial.suggest_float("share", self.low, self.high) if self.low < self.high else self.high
        name = trial.suggest_categorical("first", tuple(self.singles))
        first = self._method(trial, name)
        if self._can_lead(name):
            second = trial.suggest_categorical("second", (_NOBODY, *self.late))
            if second not in (_NOBODY, name):
                return Candidate((first, self._method(trial, second)), trial.suggest_float("split", 0.0, 1.0), share)
        return Candidate((first,), 0.0, share)

    def _method(self, trial: Trial, name: str) -> Scorer:
        """The method as it comes, or with every knob drawn."""
        knobs = self._knobs[name]
        if not knobs or trial.suggest_categorical(f"{name}.stock", (True, False)):
            return self.singles[name]
        drawn = {knob.field: knob.draw(trial, name) for knob in knobs}
        return dataclasses.replace(self.singles[name], **drawn)
