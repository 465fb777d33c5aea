"""Methods as people write them: `fastv`, with knobs `gemfilter(layer=3)`, and chains `flowcut@1/2+fastv`.

The members of a chain are joined by `+` and act in this order. One with `@keep` behind it always has that budget; those
without take the budget that comes with the chain: the row's in a sweep, `keep` in `vtprune.prune`. Each budget counts
what the methods so far leave, so a chain never keeps more than its fixed members do. A text that ends in `.json` is a
saved plan, which carries its own counts.

Behind a method its rules may stand, each after a `/`: a selection, a remainder, or both, with knobs of their own, such
as `flowcut/dpp/nearest`, `fastv(layer=3)/summary` or `fastv/strata(by='window')/nearest@1/4`. Everything before the
first `@` of a member is the method and its rules, so the slash of a fraction is none of theirs.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.budget import parse_keep
from vtprune.errors import BudgetError, InputError, PlanError, UnknownNameError
from vtprune.plan import Plan

if TYPE_CHECKING:
    from vtprune.contract import Scorer
    from vtprune.rules import Remainder, Selection

__all__ = [
    "Chain",
    "load_plan",
    "parse_chain",
    "parse_knobs",
    "parse_method",
    "row_chain",
    "split_methods",
    "sweep_methods",
    "with_seed",
]


@dataclass(frozen=True)
class Chain:
    """Methods in order, with the budgets that are written behind them; a lone method is a chain of one.

    Attributes:
        text: as it was written.
        methods: the members; none of a saved plan.
        fixed: the budget of each member, None where it takes the one that comes with the chain.
        plan: the saved plan that the text names, None if it names methods.
    """

    text: str
    methods: tuple[Scorer, ...]
    fixed: tuple[int | float | None, ...]
    plan: Plan | None = None

    @property
    def open(self) -> tuple[bool, ...]:
        """For each member, whether it takes the budget that comes with the chain."""
        return tuple(b is None and m.takes_budget for b, m in zip(self.fixed, self.methods, strict=True))

    @property
    def decides(self) -> bool:
        """It runs without a budget that comes with it, because every open member can decide by itself."""
        return all(m.adaptive for m, is_open in zip(self.methods, self.open, strict=True) if is_open)

    def keeps(self, keep: Any) -> Any:
        """`keep` as `vtprune.prune` takes it for these methods: the fixed budgets with the given ones between them.

        Args:
            keep: one budget, or a list with one for each member that has none; returned as it is if no budget is fixed.

        Raises:
            BudgetError: if there are not as many as members without one.
        """
        if all(self.open) or len(self.methods) == 1:
            return keep
        given = list(keep) if isinstance(keep, (list, tuple)) else [keep]
        missing = sum(self.open)
        if not missing and keep is None:
            given = []
        if len(given) != missing:
            raise BudgetError(
                f"{missing} of the {len(self.fixed)} methods in {self.text!r} take a budget and have no @keep behind "
                f"them, so it takes {missing} budget(s), got keep={keep!r}."
            )
        rest = iter(given)
        return [next(rest) if is_open else budget for budget, is_open in zip(self.fixed, self.open, strict=True)]


def _split(text: str, separator: str) -> list[str]:
    """Every part, empty ones too."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def split_methods(text: str, separator: str = ",") -> list[str]:
    """`a,b(c=1,d=2)` -> ["a", "b(c=1,d=2)"]: separators inside brackets do not count."""
    return [part for part in _split(text, separator) if part]


def sweep_methods(text: str) -> tuple[str, ...]:
    """The chains of a sweep, separated by commas, each once; `all` stands for every registered method.

    Raises:
        InputError: if there is none.
    """
    from vtprune.contract import METHODS

    listed = [list(METHODS) if name == "all" else [name] for name in split_methods(text)]
    names = tuple(dict.fromkeys(name for part in listed for name in part))
    if not names:
        raise InputError(f"name at least one method, got {text!r}. Legal: all, {', '.join(METHODS)}.")
    return names


def row_chain(text: str) -> Chain:
    """A chain that takes the one budget of its row, or none because it decides by itself or is a saved plan.

    Raises:
        BudgetError: unless exactly one member is open, or none is and one takes no budget.
        InputError, UnknownNameError, PlanError: as `parse_chain` does.
    """
    chain = parse_chain(text)
    if chain.plan is not None:
        return chain
    alone = not any(chain.open) and not all(m.takes_budget for m in chain.methods)
    if sum(chain.open) != 1 and not alone:
        members = ", ".join(f"{name!r}" for name in split_methods(text, "+"))
        raise BudgetError(
            f"exactly one method of a chain takes the row's budget, every other one needs its own behind an @, such as "
            f"'flowcut@1/2+fastv'; got {text!r}, where {sum(chain.open)} of {members} have none."
        )
    return chain


def parse_chain(text: str) -> Chain:
    """Read `method`, `method@keep`, and several of these joined by `+`; signs inside brackets do not count.

    A text that ends in `.json` is the file of a saved plan.

    Raises:
        InputError: if there is no such file.
        UnknownNameError: if a method is not registered.
        PlanError: if a member is empty, or its knobs are malformed.
        BudgetError: if what stands behind an `@` is not a budget.
    """
    if text.strip().endswith(".json"):
        return Chain(text, (), (), load_plan(Path(text.strip())))
    methods: list[Scorer] = []
    fixed: list[int | float | None] = []
    for member in _split(text, "+"):
        name, *keep = _split(member, "@")
        if not name or len(keep) > 1:
            raise PlanError(f"a chain is written 'method+method' or 'method@keep+method', got {text!r}.")
        methods.append(parse_method(name))
        try:
            fixed.append(parse_keep(keep[0]) if keep else None)
        except BudgetError as error:
            raise BudgetError(f"behind the @ of {member!r}: {error}") from error
    return Chain(text, tuple(methods), tuple(fixed))


def load_plan(path: Path) -> Plan:
    """A plan file.

    Raises:
        InputError: if there is no such file.
        PlanError: if it is not a plan.
    """
    if not path.is_file():
        raise InputError(f"there is no plan file {str(path)!r}. Write one with `vtprune plan --save`.")
    return Plan.load(path)


def with_seed(text: str, seed: int) -> str:
    """A chain whose members draw with `seed`, those that draw at all and were given none.

    >>> with_seed("flowcut@1/2+random", 3)
    'flowcut@1/2+random(seed=3)'
    """
    if text.strip().endswith(".json"):
        return text
    members = []
    for member in _split(text, "+"):
        written, *keep = _split(member, "@")
        alone, *rules = _split(written, "/")
        name, knobs = parse_knobs(alone)
        known = {knob.name for knob in dataclasses.fields(parse_method(alone))}
        if "seed" in known - knobs.keys():
            alone = f"{name}({', '.join(f'{knob}={value!r}' for knob, value in {**knobs, 'seed': seed}.items())})"
        members.append("@".join(["/".join([alone, *rules]), *keep]))
    return "+".join(members)


def parse_method(text: str) -> Scorer:
    """The method that `text` names, with its knobs, and with its rules if some stand behind it.

    Raises:
        UnknownNameError: if it, or a rule, is not registered.
        PlanError: if a knob is not one of the method's, or the text is not `name` or `name(knob=value, ...)`.
    """
    from vtprune.contract import METHODS
    from vtprune.recipe import Recipe
    from vtprune.registry import load_entry

    written, *rules = _split(text, "/")
    name, knobs = parse_knobs(written, known=METHODS.__getitem__)
    method = load_entry(METHODS, {"name": name, **knobs})
    return Recipe(method, *_rules(text, rules)) if rules else method


def _rules(text: str, written: list[str]) -> tuple[Selection | None, Remainder | None]:
    from vtprune.registry import load_entry
    from vtprune.rules import REMAINDERS, SELECTIONS

    chosen: Selection | None = None
    rest: Remainder | None = None
    names = {*SELECTIONS, *REMAINDERS}

    def known(name: str) -> None:
        if name not in names:
            raise UnknownNameError("selection or remainder", name, names)

    for rule in written:
        name, knobs = parse_knobs(rule, known=known)
        if name in set(SELECTIONS) and chosen is None and rest is None:
            chosen = load_entry(SELECTIONS, {"name": name, **knobs})
        elif name in set(REMAINDERS) and rest is None:
            rest = load_entry(REMAINDERS, {"name": name, **knobs})
        else:
            raise PlanError(
                f"rules are written 'method/selection', 'method/remainder' or 'method/selection/remainder', such as "
                f"'flowcut/dpp/nearest', got {text!r}. Selections: {', '.join(SELECTIONS)}. "
                f"Remainders: {', '.join(REMAINDERS)}."
            )
    return chosen, rest


def parse_knobs(text: str, known: Callable[[str], object] = str) -> tuple[str, dict[str, Any]]:
    """`name(a=1, b='x')` -> ("name", {"a": 1, "b": "x"}); `name` -> ("name", {}).

    Args:
        text: what was written.
        known: raises if there is no such name; called before the knobs are read.

    Raises:
        PlanError: if the text is written in another way.
    """
    name, bracket, rest = text.strip().partition("(")
    known(name.strip())
    knobs: dict[str, Any] = {}
    if not bracket:
        return name.strip(), knobs
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError
            knobs[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise PlanError(
            f"a method is written 'name' or 'name(knob=value, ...)', such as 'gemfilter(layer=3)' or "
            f"\"fastv(positions='compact')\", got {text!r}."
        ) from error
    return name.strip(), knobs
