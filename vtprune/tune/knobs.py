"""The knobs of a method that can be searched, read off the fields of its dataclass.

A field's type says which values make sense; the method's own checks, and attaching it to the model, say which of them
are legal here. So a new method is searched without a list being kept anywhere.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vtprune.contract import Scorer
from vtprune.errors import VtpruneError

__all__ = ["Choice", "Knob", "Schedule", "Span", "Trial", "knobs_of", "own_fields"]

_STEPS = 20


class Trial(Protocol):
    """The part of an optuna trial that draws values."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A number in [low, high]."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        """A number in [low, high]."""
        ...


class Knob(Protocol):
    """One field of a method."""

    @property
    def field(self) -> str:
        """Its name."""
        ...

    def draw(self, trial: Trial, method: str) -> Any:
        """A value for the field; parameters are named `method.field`."""


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    field: str
    values: tuple[Any, ...]

    def draw(self, trial: Trial, method: str) -> Any:
        """See `Knob`."""
        return trial.suggest_categorical(f"{method}.{self.field}", self.values)


@dataclass(frozen=True)
class Span:
    """A whole number, or a number in 20 steps."""

    field: str
    low: int | float
    high: int | float

    def draw(self, trial: Trial, method: str) -> Any:
        """See `Knob`."""
        name = f"{method}.{self.field}"
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high)
        # rounded, so that the plan's file reads 0.15 and not 0.15000000000000002
        return round(trial.suggest_float(name, self.low, self.high, step=(self.high - self.low) / _STEPS), 10)


@dataclass(frozen=True)
class Schedule:
    """Evenly spaced layers: the first one, and how far it is from one to the next (less where they would not fit).

    Attributes:
        count: how many.
        low, high: of the first layer.
        last: the last legal layer.
    """

    field: str
    count: int
    low: int
    high: int
    last: int

    def draw(self, trial: Trial, method: str) -> tuple[int, ...]:
        """See `Knob`."""
        first = trial.suggest_int(f"{method}.{self.field}.first", self.low, self.high)
        gap = trial.suggest_int(f"{method}.{self.field}.gap", 1, max(1, self.last // self.count))
        gap = max(1, min(gap, (self.last - first) // max(1, self.count - 1)))
        return tuple(first + gap * place for place in range(self.count))


def knobs_of(method: Scorer, depth: int, check: Callable[[Scorer], bool]) -> list[Knob]:
    """The knobs of `method` with the values that are legal on one model.

    Searched are: literals and flags (every value), `int | None` (a layer of the decoder), `tuple[int, ...] | None` (a
    schedule of layers), ints (up to twice the default) and floats (from 0, or half the default, to twice the default).
    A number whose default is 0 has no scale, and is left alone (seeds, offsets); so are fields that a base class
    declares (where a predictor's weights lie), and fields with fewer than two legal values.

    Args:
        method: with its default knobs.
        depth: decoder layers.
        check: whether a method can run on the model.
    """
    hints = typing.get_type_hints(type(method))

    def legal(field: str, value: Any) -> bool:
        try:
            return check(dataclasses.replace(method, **{field: value}))
        except VtpruneError:
            return False

    found = []
    for name in own_fields(method):
        knob = _knob(name, hints[name], getattr(method, name), depth, legal)
        if knob is not None:
            found.append(knob)
    return found


def own_fields(method: Scorer) -> list[str]:
    """The fields that the method's class declares itself."""
    # classes are read by their fields and not by their annotations, which newer Pythons make on demand
    inherited = {f.name for base in type(method).__bases__ if dataclasses.is_dataclass(base) for f in _fields(base)}
    return [f.name for f in _fields(method) if f.name not in inherited]


def _fields(of: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(of)


def _knob(name: str, hint: Any, default: Any, depth: int, legal: Callable[[str, Any], bool]) -> Knob | None:
    members = [part for part in _members(hint) if part is not type(None)]
    optional = len(members) < len(_members(hint))
    kind = members[0] if len(members) == 1 else None
    if typing.get_origin(kind) is Literal or kind is bool:
        values = tuple(v for v in (typing.get_args(kind) or (False, True)) if legal(name, v))
        return Choice(name, values) if len(values) > 1 else None
    if kind is int and optional:
        layers = [k for k in range(depth) if legal(name, k)]
        return Span(name, layers[0], layers[-1]) if len(layers) > 1 else None
    if kind == tuple[int, ...] and optional:
        return _schedule(name, depth, legal)
    if kind is int and default:
        values = tuple(v for v in range(1, 2 * default) if legal(name, v))
        return Choice(name, values) if len(values) > 1 else None
    if kind is float and default:
        low, high = (0.0 if legal(name, 0.0) else default / 2), 2.0 * default
        return Span(name, low, high) if legal(name, low) and legal(name, high) else None
    return None


def _members(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); anything else stands for itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _schedule(name: str, depth: int, legal: Callable[[str, Any], bool]) -> Schedule | None:
    """The longest schedule of up to four neighbouring layers that is legal, wherever it can begin and end."""
    for count in range(min(4, depth), 1, -1):
        starts = [k for k in range(depth - count + 1) if legal(name, tuple(range(k, k + count)))]
        if len(starts) > 1:
            return Schedule(name, count, starts[0], starts[-1], starts[-1] + count - 1)
    return None
