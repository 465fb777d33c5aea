"""A sweep in a YAML file: the options of `vtprune eval`, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vtprune.errors import InputError, UnknownNameError

__all__ = ["read_sweep_file", "use_sweep_file"]

_NOT_IN_FILES = ("config", "tasks_dir", "help")


def read_sweep_file(path: Path, options: list[str]) -> dict[str, Any]:
    """The options that a file sets, as the command line would spell them: lists joined by commas.

    Args:
        path: the file.
        options: legal names.

    Raises:
        InputError: if there is no such file, or it is no mapping of names to values.
        UnknownNameError: if an option is not known.
    """
    import yaml

    if not path.is_file():
        raise InputError(f"there is no sweep file {str(path)!r}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{str(path)!r} must set options by name, such as `methods: [flowcut, fastv]`; got {data!r}.")
    read: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise UnknownNameError(f"option in {str(path)!r}", str(key), options)
        if isinstance(value, dict):
            raise InputError(f"{key} in {str(path)!r} must be a value or a list of values, got {value!r}.")
        read[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return read


def use_sweep_file(context: click.Context, path: Path | None) -> Path | None:
    """Callback of --config: what the file sets becomes the default of what the command line leaves open."""
    if path is not None:
        options = [str(p.name) for p in context.command.params if p.name not in _NOT_IN_FILES]
        context.default_map = {**(context.default_map or {}), **read_sweep_file(path, options)}
    return path
