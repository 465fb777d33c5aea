"""Self-registration: a module in a walked folder registers its class, and nobody keeps a list by hand."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from vtprune.errors import PlanError, UnknownNameError

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

__all__ = ["Registry", "load_entry", "write_entry"]


class Registry(Generic[T]):
    """Names to classes, filled the first time it is read by importing every module of `package`.

    Args:
        kind: noun used in messages, e.g. `"method"`.
        package: dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, type[T]] = {}
        self._unlisted: set[str] = set()
        self._walked = False

    def register(self, name: str, *, listed: bool = True) -> Callable[[C], C]:
        """Class decorator that files the class under `name`.

        Args:
            name: what users call it.
            listed: shown wherever all entries are; one that is not can only be asked for by name.

        Raises:
            ValueError: if another class already has this name.
        """

        def add(cls: C) -> C:
            known = self._entries.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"{self._kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}"
                )
            self._entries[name] = cast("type[T]", cls)
            if not listed:
                self._unlisted.add(name)
            return cls

        return add

    def _walk(self) -> None:
        if self._walked:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._walked = True

    def __getitem__(self, name: str) -> type[T]:
        """The class registered as `name`.

        Raises:
            UnknownNameError: with the closest registered name.
        """
        self._walk()
        if name not in self._entries:
            raise UnknownNameError(self._kind, name, list(self))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._walk()
        return iter(sorted(self._entries.keys() - self._unlisted))

    def items(self) -> list[tuple[str, type[T]]]:
        """All listed (name, class) pairs, sorted by name."""
        return [(name, self[name]) for name in self]


def write_entry(entry: Any) -> dict[str, Any]:
    """JSON-ready form of a registered dataclass: its name and every field."""
    return {"name": entry.name, **{f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}}


def load_entry(registry: Registry[T], data: Mapping[str, Any]) -> T:
    """Inverse of `write_entry`.

    Raises:
        UnknownNameError: if nothing is registered under this name.
        PlanError: if a field is not one of the class's knobs.
    """
    fields = dict(data)
    name = str(fields.pop("name", ""))
    cls: Any = registry[name]
    known = {f.name for f in dataclasses.fields(cls)}
    if not set(fields) <= known:
        raise PlanError(f"{name} has the knobs {sorted(known)}, got {sorted(set(fields) - known)} beside them.")
    return cls(**{k: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for k, v in fields.items()})
