"""What a visitor has chosen, as one value: it becomes runs, a link, and the code that repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from vtprune.budget import parse_keep
from vtprune.errors import InputError, PlanError
from vtprune.specs import parse_chain, parse_knobs, parse_method, split_methods

__all__ = ["MAX_NEW_TOKENS", "Run", "Settings", "public_knobs", "read_method", "without_rules"]

MAX_NEW_TOKENS = 256
_BASES = ("average", "final")


@dataclass(frozen=True)
class Run:
    """One way to prune, as `vtprune.prune` takes it.

    Attributes:
        method: a chain, such as "fastv" or "flowcut@50%+gemfilter(layer=3)".
        keep: the budget, None if the method decides by itself.
        basis: what the budget counts.
    """

    method: str
    keep: str | None
    basis: str = "average"

    @property
    def title(self) -> str:
        """For people."""
        return self.method if self.keep is None else f"{self.method}, keep {self.keep}"

    def attach(self, model: Any, *, record_scores: bool = False) -> Any:
        """Prune `model`; returns the session."""
        import vtprune

        return vtprune.prune(model, self.method, keep=self.keep, basis=self.basis, record_scores=record_scores)


def public_knobs(name: str) -> list[str]:
    """The knobs of a method that a visitor may set: those its own class declares.

    What base classes declare says from which folder or repository weights are read, which is not for visitors, and what
    is marked as internal is set by plans.
    """
    from vtprune.tune.knobs import own_fields

    method = parse_method(name)
    internal = {f.name for f in dataclasses.fields(method) if f.metadata.get("internal")}
    return [knob for knob in own_fields(method) if knob not in internal]


def without_rules(text: str) -> str:
    """`flowcut(every=1)/dpp/nearest` -> `flowcut(every=1)`."""
    return (split_methods(text, "/") or [""])[0]


def read_method(text: str) -> str:
    """One method with its knobs and rules, checked.

    Raises:
        UnknownNameError: if there is no such method.
        PlanError: if it is a chain or a file, or sets a knob that visitors may not.
    """
    parse_method(text)
    name, knobs = parse_knobs(without_rules(text))
    refused = sorted(set(knobs) - set(public_knobs(name)))
    if refused:
        raise PlanError(
            f"the knob(s) {', '.join(refused)} of {name} cannot be set here: they say where files are read. "
            f"Settable: {', '.join(public_knobs(name)) or 'none'}."
        )
    return text.strip()


@dataclass(frozen=True)
class Settings:
    """All that a question depends on, beside uploaded files.

    Attributes:
        model: spec of a model.
        example: name of a shipped example, "" if files were uploaded.
        question: to be asked.
        method: with its knobs and rules, such as "gemfilter(layer=3)" or "flowcut/dpp/nearest".
        keep: the budget ("25%", "64", "1/9"); "" leaves the decision to a method that can decide.
        first: a method that cuts before `method`, "" for none.
        first_keep: what it leaves.
        beside: another method at the same budget, to compare with, "" for none.
        basis: "average" over the decoder layers, or "final".
        max_new_tokens: length of an answer at most.

    Raises:
        InputError: if `basis` or `max_new_tokens` is out of range.
    """

    model: str = ""
    example: str = ""
    question: str = ""
    method: str = "flowcut"
    keep: str = "25%"
    first: str = ""
    first_keep: str = "50%"
    beside: str = ""
    basis: str = "average"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.basis not in _BASES:
            raise InputError(f"basis must be one of {', '.join(_BASES)}, got {self.basis!r}.")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise InputError(f"an answer has 1 to {MAX_NEW_TOKENS} new tokens, got {self.max_new_tokens}.")

    def runs(self) -> list[Run]:
        """The method, and the one to compare with.

        Raises:
            UnknownNameError, PlanError, BudgetError: if a method or a budget is not legal; nothing has run.
        """
        return [self._run(text) for text in (self.method, self.beside) if text]

    def _run(self, text: str) -> Run:
        method = parse_method(read_method(text))
        chain = text.strip()
        if self.first:
            parse_keep(self.first_keep)
            chain = f"{read_method(self.first)}@{self.first_keep.strip()}+{chain}"
        parse_chain(chain)
        keep: str | None = self.keep.strip()
        if not method.takes_budget or (not keep and method.adaptive):
            keep = None
        else:
            parse_keep(keep)
        return Run(chain, keep, self.basis)

    def query(self) -> str:
        """The settings that are not the usual ones, as the query of a link."""
        usual = Settings()
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return urlencode({name: value for name, value in named.items() if value != getattr(usual, name)})

    @classmethod
    def from_query(cls, query: Mapping[str, str], usual: Settings) -> Settings:
        """Inverse of `query`; names that are not settings are left alone.

        Raises:
            InputError: if a value is not legal.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {name: value for name, value in query.items() if name in names}
        if "max_new_tokens" in given:
            text = given["max_new_tokens"]
            if not text.isdecimal():
                raise InputError(f"max_new_tokens must be a number, got {text!r}.")
            given["max_new_tokens"] = int(text)
        return dataclasses.replace(usual, **given)
