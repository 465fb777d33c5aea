"""Questions about one's own images: JSON lines {"image": path, "question": text, "answer": text}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import InputError

__all__ = ["DataLine", "read_data_lines"]


@dataclass(frozen=True)
class DataLine:
    """One line of a data file.

    Attributes:
        where: "line 3 of 'data.jsonl'", for messages.
        number: line number, from 1.
        images: paths as they are on disk; at least one, not opened yet.
        answer, kind: empty and None where the line has none.
    """

    where: str
    number: int
    images: tuple[Path, ...]
    question: str
    answer: str = ""
    kind: str | None = None


def read_data_lines(path: Path, *, answers: bool = False) -> Iterator[DataLine]:
    """The lines of a data file, one by one; empty ones are skipped.

    A line is `{"image": path or [paths], "question": text, "answer": text, "kind": text}`; images are looked up beside
    the file. `answer` and the optional `kind` are read if `answers` is set.

    Raises:
        InputError: if there is no such file, or a line is malformed; it names the line.
    """
    if not path.is_file():
        raise InputError(f"there is no data file {str(path)!r}.")
    legal = '{"image": path or [paths], "question": text' + (', "answer": text}' if answers else "}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                entry: Any = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON: {error}.") from error
            fields = _fields(entry, answers)
            if fields is None:
                raise InputError(f"{where} must be {legal}, got {line.strip()[:80]}.")
            images, question, answer, kind = fields
            yield DataLine(where, number, tuple(path.parent / image for image in images), question, answer, kind)


def _fields(entry: Any, answers: bool) -> tuple[list[str], str, str, str | None] | None:
    """(images, question, answer, kind) of a line; None if one is missing or of another type."""
    if not isinstance(entry, dict):
        return None
    images = [entry["image"]] if isinstance(entry.get("image"), str) else entry.get("image")
    question = entry.get("question")
    if not (isinstance(images, list) and images and all(isinstance(image, str) and image for image in images)):
        return None
    if not (isinstance(question, str) and question):
        return None
    if not answers:
        return images, question, "", None
    answer, kind = entry.get("answer"), entry.get("kind")
    if not (isinstance(answer, str) and answer.strip() and isinstance(kind, str | None)):
        return None
    return images, question, answer, kind
