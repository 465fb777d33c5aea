"""Files that are whole or not there at all: a process that dies meanwhile leaves the former file as it was."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["partial_path", "put_in_place", "replace_file"]


def replace_file(path: Path, text: str) -> None:
    """Write a text file at once, or not at all; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def partial_path(path: Path) -> Path:
    """Where to write what `put_in_place` then moves to `path`."""
    return path.with_name(f"{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Move a written file to its name, once its bytes are on disk."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
