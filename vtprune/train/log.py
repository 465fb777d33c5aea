"""The CSV log of a training run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune.files import replace_file

__all__ = ["LOG_FILE", "RunLog"]

LOG_FILE = "log.csv"


class RunLog:
    """Rows of a run, appended one by one.

    Args:
        folder: of the run; the log is its `LOG_FILE`.
        columns: names of the columns; the first is the step.
        step: rows of later steps, which an interrupted run wrote and will run again, are dropped.
    """

    def __init__(self, folder: Path, columns: Sequence[str], step: int) -> None:
        self._path, self._columns = folder / LOG_FILE, list(columns)
        folder.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        # a row that was being written when the run ended has no line end
        whole = text[: text.rfind("\n") + 1].splitlines()[1:]
        kept = [line for line in whole if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= step]
        replace_file(self._path, "\n".join([",".join(self._columns), *kept]) + "\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; what it has no value for stays empty."""
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(line.getvalue())
