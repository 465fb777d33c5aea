"""Pictures and a film that ship with vtprune, with questions that the embedded models were made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vtprune.errors import InputError, UnknownNameError

__all__ = ["FOLDER", "Example", "example", "examples"]

FOLDER = Path(__file__).parent / "tiny" / "examples"
_FILMS = (".mp4",)


@dataclass(frozen=True)
class Example:
    """Something to ask about.

    Attributes:
        name: what commands and links call it.
        title: one line about it.
        files: its pictures, or its film.
        questions: each with the right answer.
        models: the embedded models that were trained for it.
    """

    name: str
    title: str
    files: tuple[Path, ...]
    questions: tuple[tuple[str, str], ...]
    models: tuple[str, ...]

    @property
    def images(self) -> tuple[Path, ...]:
        """The files that are still pictures."""
        return tuple(file for file in self.files if file.suffix not in _FILMS)

    @property
    def videos(self) -> tuple[Path, ...]:
        """The files that are films."""
        return tuple(file for file in self.files if file.suffix in _FILMS)


@cache
def examples() -> dict[str, Example]:
    """All examples by name.

    Raises:
        InputError: if this installation holds none.
    """
    listing = FOLDER / "examples.json"
    if not listing.is_file():
        raise InputError("this installation holds no examples. Pass --image and --question.")
    found: dict[str, Example] = {}
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        files = tuple(FOLDER / name for name in entry["files"])
        questions = tuple((asked["question"], asked["answer"]) for asked in entry["questions"])
        found[entry["name"]] = Example(entry["name"], entry["title"], files, questions, tuple(entry["models"]))
    return found


def example(name: str) -> Example:
    """The example of this name.

    Raises:
        UnknownNameError: with the closest name, if there is none.
    """
    if name not in examples():
        raise UnknownNameError("example", name, examples())
    return examples()[name]
