"""Methods as people write them on a command line: `fastv`, or with knobs `gemfilter(layer=3)`."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from vtprune.errors import PlanError

if TYPE_CHECKING:
    from vtprune.contract import Scorer

__all__ = ["parse_method", "split_methods"]


def split_methods(text: str, separator: str = ",") -> list[str]:
    """`a,b(c=1,d=2)` -> ["a", "b(c=1,d=2)"]: separators inside brackets do not count."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def parse_method(text: str) -> Scorer:
    """The method that `text` names, with its knobs.

    Raises:
        UnknownNameError: if it is not registered.
        PlanError: if a knob is not one of the method's, or the text is not `name` or `name(knob=value, ...)`.
    """
    from vtprune.contract import METHODS, Scorer

    name, bracket, rest = text.strip().partition("(")
    method = METHODS[name.strip()]
    if not bracket:
        return method()
    knobs: dict[str, Any] = {}
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
    return Scorer.from_dict({"name": name.strip(), **knobs})
