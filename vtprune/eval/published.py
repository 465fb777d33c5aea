"""What papers report for LLaVA-1.5-7B: a reference layer beside what was measured, never mixed with it.

The numbers are in `published.json`, each with the paper it was read in. Papers contradict each other (FastV at 192
tokens retains 87.8 % as usually copied and 95.9 % run again), so all versions are there, side by side.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune.eval.rows import Row
from vtprune.eval.suites import SUITES
from vtprune.eval.table import tasks_of

__all__ = ["COLUMN_OF", "PaperMark", "PaperRow", "PaperTable", "applies", "is_that_model", "paper_marks", "published"]

COLUMN_OF = {
    "gqa": "GQA",
    "mmbench_en_dev_static": "MMB",
    "pope": "POPE",
    "scienceqa_img": "SQA",
    "vqav2_val": "VQAv2",
    "textvqa_val": "TextVQA",
    "vizwiz_vqa_val": "VizWiz",
}
"""Column of the papers' tables by lmms-eval task, where both are accuracies in percent."""

_MODEL = re.compile(r"llava-?(v)?1\.5-?7b", re.IGNORECASE)


@dataclass(frozen=True)
class PaperRow:
    """One line of a paper's table.

    Attributes:
        method: as named there.
        tokens: visual tokens a decoder layer on average; None where only a cost is given.
        scores: by column.
        retention: percent of unpruned over the table's tasks, None if not given.
        tasks: how many tasks the retention is over, where a score is missing.
        average: mean score as the paper forms it.
        macs: T multiply-accumulates of the image tokens, where the budget is given as such.
        vizwiz: split of its VizWiz score, where tables differ.
        source: papers, with arXiv id where it is known.
    """

    method: str
    tokens: int | None
    scores: dict[str, float]
    retention: float | None
    source: tuple[str, ...]
    tasks: int | None = None
    average: float | None = None
    macs: float | None = None
    vizwiz: str | None = None


@dataclass(frozen=True)
class PaperTable:
    """Lines of one protocol, which may be compared with each other.

    Attributes:
        name: a word for the file.
        title, note: for people.
        columns: tasks, in order.
        full: scores of the unpruned model there.
        rows: the lines.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    full: dict[str, float]
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class PaperMark:
    """One published accuracy on one task."""

    row: PaperRow
    table: PaperTable
    tokens: int
    accuracy: float


@functools.cache
def published() -> tuple[PaperTable, ...]:
    """All tables."""
    data = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    names = {key: _source(**source) for key, source in data["sources"].items()}
    tables = []
    for table in data["tables"]:
        rows = tuple(PaperRow(**{**row, "source": tuple(names[key] for key in row["source"])}) for row in table["rows"])
        tables.append(
            PaperTable(table["id"], table["title"], table["note"], tuple(table["columns"]), table["full"], rows)
        )
    return tuple(tables)


def _source(paper: str, table: str, arxiv: str | None) -> str:
    """`HiPrune, Table 2 (arXiv:2508.00553)`."""
    place = f"{paper}, {table}" if table else paper
    return f"{place} ({f'arXiv:{arxiv}' if arxiv else 'arXiv id not known'})"


def is_that_model(rows: Sequence[Row]) -> bool:
    """The rows are of LLaVA-1.5-7B, going by the model's name."""
    return any(_MODEL.search(str(row.run.get("model", ""))) for row in rows)


def applies(rows: Sequence[Row]) -> bool:
    """The papers' tables say something about these rows: the same model, or tasks that they report."""
    return is_that_model(rows) or any(task in SUITES["llava15"] for task in tasks_of(rows))


def paper_marks(rows: Sequence[Row], task: str) -> Iterator[PaperMark]:
    """Published accuracies to draw beside the rows on a task: none unless model and task are those of the papers."""
    column = COLUMN_OF.get(task)
    if column is None or not is_that_model(rows):
        return
    for table in published():
        for row in table.rows:
            if row.tokens is not None and column in row.scores:
                yield PaperMark(row, table, row.tokens, row.scores[column])
