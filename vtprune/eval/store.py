"""Cells of a sweep on disk: one file each, complete or not there, found again by what they were asked with.

A cell is one method at one budget on one task with one seed. Its file is JSON lines: first what was run and how it
went, then one line a question. It is written under another name and moved into place, so that a sweep that is killed
loses at most the cell it was at.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import vtprune
from vtprune.errors import InputError
from vtprune.eval.harness import Sample
from vtprune.files import replace_file
from vtprune.tiny import tiny_folder

__all__ = ["CellKey", "CellResult", "CellStore", "read_cell", "read_cells", "settings_of"]

_FORMAT = 1


@dataclass(frozen=True)
class CellKey:
    """What a cell was asked with; equal keys stand for equal answers.

    Attributes:
        method: as the user wrote it, or `unpruned`.
        keep: the budget as it was read.
        task: name.
        seed: of questions and of methods that draw; None where neither depends on it.
        basis: what the budget counts.
        settings: of the sweep: model and its files, limit, batch size, dtype, device, versions.
    """

    method: str
    keep: int | float | None
    task: str
    seed: int | None
    basis: str
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """16 hex digits."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """File name: readable in front, unmistakable behind."""
        words = (self.method, "own" if self.keep is None else f"{self.keep:.4g}", self.task)
        seed = () if self.seed is None else (f"seed{self.seed}",)
        return "-".join([*(re.sub(r"[^\w.@+]+", "_", word).strip("_")[:60] for word in words), *seed, self.digest])


@dataclass
class CellResult:
    """How a cell went.

    Attributes:
        status: of a `Row`.
        message: why there are no figures.
        floor: smallest budget, if the cell's is out of reach.
        plan: as JSON, None if nothing was attached.
        samples: one a question, in order of doc id.
        seconds: that asking took.
    """

    status: str = "ok"
    message: str = ""
    floor: float | None = None
    plan: dict[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0


class CellStore:
    """The cells below a folder.

    Args:
        folder: of the sweep; None keeps nothing.
        fresh: cells that are there already are not read.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self._folder, self._fresh = folder, fresh
        self._written: set[str] = set()

    def load(self, key: CellKey) -> CellResult | None:
        """The cell, if it is there and did not fail: what failed is tried again.

        Raises:
            InputError: if its file is damaged; it names the file.
        """
        path = self._path(key)
        if path is None or not path.is_file() or (self._fresh and key.digest not in self._written):
            return None
        _, result = read_cell(path)
        return None if result.status == "failed" else result

    def save(self, key: CellKey, result: CellResult, log: str = "") -> None:
        """Write the cell, and beside it what was printed and raised meanwhile."""
        path = self._path(key)
        if path is None:
            return
        self._written.add(key.digest)
        head = {"vtprune_cell": _FORMAT, "key": asdict(key), **asdict(result), "samples": len(result.samples)}
        lines = [json.dumps(head, default=str), *(json.dumps(asdict(sample)) for sample in result.samples)]
        replace_file(path, "".join(line + "\n" for line in lines))
        replace_file(path.parent.parent / "logs" / f"{path.stem}.log", log)

    def _path(self, key: CellKey) -> Path | None:
        return None if self._folder is None else self._folder / "cells" / f"{key.file}.jsonl"


def read_cells(folder: Path) -> Iterator[tuple[dict[str, Any], CellResult]]:
    """(key, result) of every cell of a sweep, the newest last.

    Raises:
        InputError: if the folder holds none, or a file is damaged.
    """
    paths = sorted((folder / "cells").glob("*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not paths:
        raise InputError(f"the folder {str(folder)!r} holds no cells of a sweep. Pass the --out of `vtprune eval`.")
    for path in paths:
        yield read_cell(path)


def read_cell(path: Path) -> tuple[dict[str, Any], CellResult]:
    """(key, result) of a cell's file.

    Raises:
        InputError: if it is damaged.
    """
    try:
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if head.pop("vtprune_cell") != _FORMAT or head.pop("samples") != len(lines):
            raise ValueError("not all of it is there, or it is of another version")
        key = head.pop("key")
        return key, CellResult(**head, samples=[Sample(**line) for line in lines])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the cell {str(path)!r} is damaged ({error}). Delete it, and it is run again.") from error


def settings_of(model: str, versions: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """What a key holds beside its cell: the model with its local files, versions, and this package's own code."""
    kind, _, name = model.partition(":")
    folder = tiny_folder(name) if kind == "tiny" else Path(model).expanduser()
    files = []
    if folder.is_dir():
        wanted = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".jinja", ".gz"))
        # an embedded model's files are as old as the installation
        files = [
            (str(p.relative_to(folder)), p.stat().st_size, None if kind == "tiny" else p.stat().st_mtime_ns)
            for p in wanted
        ]
    return {"model": model, "files": files, "versions": dict(versions), "code": _code(), **more}


@functools.cache
def _code() -> str:
    """A digest of this package's modules, so that whoever changes one is not shown old answers."""
    root, digest = Path(vtprune.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
