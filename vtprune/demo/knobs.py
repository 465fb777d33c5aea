"""The knobs of a method as fields of a form, read off its dataclass and the docstring beside it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass
from typing import Any, Literal

from vtprune.demo.settings import public_knobs, without_rules
from vtprune.specs import parse_knobs, parse_method, split_methods

__all__ = ["Field", "fields_of", "with_knob"]

_AUTO = "as the method has it"


@dataclass(frozen=True)
class Field:
    """One knob.

    Attributes:
        name: of the field.
        about: what the docstring says of it.
        value: what it is set to, as text.
        choices: the legal texts, if they can be counted.
    """

    name: str
    about: str
    value: str
    choices: tuple[str, ...] = ()


def fields_of(text: str) -> list[Field]:
    """The knobs of a method that is written with or without some of them.

    Raises:
        UnknownNameError, PlanError: if `text` is no method.
    """
    method = parse_method(without_rules(text))
    hints = typing.get_type_hints(type(method))
    about = _docs(type(method))
    return [
        Field(knob, about.get(knob, ""), _written(getattr(method, knob)), _choices(hints[knob]))
        for knob in public_knobs(method.name)
    ]


def with_knob(text: str, knob: str, value: str) -> str:
    """The method with one knob set to what was typed; an empty text, or the usual value, takes it out.

    >>> with_knob("fastv(layer=3)", "positions", "compact")
    "fastv(layer=3, positions='compact')"

    Raises:
        UnknownNameError, PlanError: if that is not legal.
    """
    alone, *rules = split_methods(text, "/") or [""]
    name, knobs = parse_knobs(alone)
    usual = {f.name: getattr(parse_method(name), f.name) for f in dataclasses.fields(parse_method(name))}
    knobs.pop(knob, None)
    read = _read(value.strip())
    if value.strip() not in ("", _AUTO) and read != usual.get(knob, _AUTO):
        knobs[knob] = read
    inside = ", ".join(f"{key}={each!r}" for key, each in knobs.items())
    written = "/".join([f"{name}({inside})" if inside else name, *rules])
    parse_method(written)
    return written


def _written(value: Any) -> str:
    if value is None:
        return _AUTO
    return value if isinstance(value, str) else repr(value)


def _read(text: str) -> Any:
    """A literal, or a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _choices(hint: Any) -> tuple[str, ...]:
    """Every legal text of a flag or a literal, () of anything else."""
    options: list[str] = []
    for member in typing.get_args(hint) or (hint,):
        if member is bool:
            options += ["True", "False"]
        elif member is type(None):
            options.append(_AUTO)
        elif typing.get_origin(member) is Literal:
            options += [str(each) for each in typing.get_args(member)]
        elif typing.get_origin(hint) is Literal:
            options.append(str(member))
        else:
            return ()
    return tuple(options)


def _docs(cls: type) -> dict[str, str]:
    """`Attributes:` of a docstring, by name."""
    section = re.search(r"^Attributes:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(cls) or "", re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else ():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            # several may be described together
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
