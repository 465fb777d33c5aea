"""Ranks methods at equal FLOPs, and splits what they lose by kind of question, size of what is asked for and ability.

    vtprune eval --config benchmarks/leaderboard.yaml
    vtprune eval --config benchmarks/kinds-scenes.yaml
    vtprune eval --config benchmarks/kinds-abilities.yaml
    python benchmarks/where_methods_fail.py            # reads runs/, writes the .json beside this file and the page

The page is docs/where_methods_fail.md: the text between its marks is replaced, the rest is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vtprune.eval.cell import Answers
from vtprune.eval.harness import Sample
from vtprune.eval.rows import UNPRUNED_ROW, Row, read_rows
from vtprune.eval.stats import Interval, paired_difference
from vtprune.eval.store import read_cells
from vtprune.eval.summary import summarise
from vtprune.tiny.questions import LOOK_AT, WEIGHTS, ask
from vtprune.tiny.scenes import question_generator, scene_objects

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "where_methods_fail.json"
PAGE = ROOT / "docs" / "where_methods_fail.md"
# what a cell is taken at: the first of these that a method reaches on every model
KEEPS = ("1/4", "1/2", "own")
QUESTIONS_PER_IMAGE = 4


@dataclass(frozen=True)
class Loss:
    """One method on one group of questions.

    Attributes:
        accuracy: share of right answers.
        lost: accuracy minus that of the unpruned model on the same questions, paired.
        beyond: accuracy minus that of `random` with as many FLOPs of decoder prefill, paired; None for `random`.
    """

    accuracy: float
    lost: Interval
    beyond: Interval | None


@dataclass(frozen=True)
class Line:
    """One method on all groups; `keep` is the budget as written, `flops` the mean share of the decoder prefill."""

    method: str
    keep: str
    flops: float
    groups: dict[str, Loss]


@dataclass(frozen=True)
class Sweep:
    """One model's part of a sweep: its rows, and every cell's answers by (method, budget, task)."""

    rows: list[Row]
    samples: Mapping[tuple[str, int | float | None, str], list[Sample]]

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """What `vtprune eval` left in `folder`."""
        found = {}
        for key, result in read_cells(folder):
            if result.status == "ok":
                found[key["method"], key["keep"], key["task"]] = result.samples
        return cls(read_rows(folder / "rows.jsonl"), found)

    @property
    def tasks(self) -> list[str]:
        """In the order they were asked."""
        return list(self.rows[0].tasks)

    def row(self, method: str, keep: str) -> Row | None:
        """The row, if it has figures."""
        found = (row for row in self.rows if row.method == method and row.keep == keep and row.status == "ok")
        return next(found, None)

    def of(self, row: Row, task: str) -> list[Sample]:
        """The row's answers; those of the unpruned model lie under the budget of all tokens."""
        if row.method == UNPRUNED_ROW:
            keys = (key for key in self.samples if (key[0], key[2]) == (row.method, task))
            return self.samples[next(keys)]
        return self.samples[row.method, row.keep_value, task]

    def beside(self, row: Row, task: str) -> list[Sample] | None:
        """`random`'s answers at the row's FLOPs, which a row of the sweep may have given: its own, or the unpruned one.

        Raises:
            ValueError: if nobody gave them.
        """
        against = row.against
        if against is None:
            return None
        found = self.samples.get((against.method, against.keep, task))
        rows = (other for other in self.rows if other.method in (against.method, UNPRUNED_ROW))
        same = [other for other in rows if other.status == "ok" and other.flops_share == against.reference_share]
        if found is None and not same:
            raise ValueError(f"nobody answered {task} as {against.method} at {against.keep}, beside {row.name}.")
        return self.of(same[0], task) if found is None else found

    def areas(self) -> dict[str, Interval]:
        """Areas under the accuracy-FLOPs curves, mean over tasks, of methods that reach all budgets."""
        answers = {}
        for row in self.rows:
            if row.status == "ok":
                answers[row.name] = Answers.of({task: self.of(row, task) for task in self.tasks}, None)
        mean = summarise(self.rows, answers).mean
        return {} if mean is None else {area.method: area.area for area in mean.areas if area.area is not None}


def sizes_of_scenes(samples: Iterable[Sample]) -> dict[tuple[str, str], str]:
    """(image, question) -> pixels of the one object that is asked for; questions about several are left out."""
    found: dict[tuple[str, str], str] = {}
    for image in dict.fromkeys(sample.image_id for sample in samples):
        split, seed, index = image.rsplit("-", 2)
        objects = scene_objects(split, int(seed), int(index))
        draws = question_generator(split, int(seed), int(index))
        for draft in ask(objects, draws, QUESTIONS_PER_IMAGE, WEIGHTS):
            looked = {read.objects for read in draft.reads if read.mode == LOOK_AT}
            if draft.kind in ("exist", "count", "relation") or len(looked) != 1:
                continue
            item = objects[looked.pop().bit_length() - 1]
            found[image, draft.question] = f"digit in a frame, {item.size} px" if item.is_digit else f"{item.size} px"
    return found


def lines(sweeps: Sequence[Sweep], group_of: Callable[[Sample], str | None]) -> list[Line]:
    """One line a method that has figures on every model, questions of all models together."""
    methods = dict.fromkeys(row.method for row in sweeps[0].rows if row.method != UNPRUNED_ROW)
    found = []
    for method in methods:
        for keep in KEEPS:
            rows = [sweep.row(method, keep) for sweep in sweeps]
            chosen = [row for row in rows if row is not None]
            if len(chosen) == len(sweeps):
                flops = sum(row.flops_share or 0.0 for row in chosen) / len(chosen)
                found.append(Line(method, keep, flops, _groups(sweeps, chosen, group_of)))
                break
    return found


def _groups(sweeps: Sequence[Sweep], rows: Sequence[Row], group_of: Callable[[Sample], str | None]) -> dict[str, Loss]:
    mine, full, other = defaultdict(list), defaultdict(list), defaultdict(list)
    images: dict[str, list[str]] = defaultdict(list)
    for sweep, row in zip(sweeps, rows, strict=True):
        # EVS answers films alone; its other tasks are missing
        for task in (task for task in sweep.tasks if task in row.tasks):
            reference = sweep.beside(row, task)
            pairs = zip(sweep.of(row, task), sweep.of(sweep.rows[0], task), strict=True)
            for place, (sample, before) in enumerate(pairs):
                if (sample.doc_id, sample.question) != (before.doc_id, before.question):
                    raise ValueError(f"{row.name} and the unpruned model were asked other questions of {task}.")
                whole = "all" if len(row.tasks) == len(sweep.tasks) else None
                for group in (whole, group_of(sample)):
                    if group is not None:
                        mine[group].append(sample.score)
                        full[group].append(before.score)
                        # the same picture under several models, or in several tasks, is one draw
                        images[group].append(sample.image_id)
                        if reference is not None:
                            other[group].append(reference[place].score)
    result = {}
    for group, scores in mine.items():
        beyond = paired_difference(scores, other[group], images[group]) if other[group] else None
        lost = paired_difference(scores, full[group], images[group])
        result[group] = Loss(sum(scores) / len(scores), lost, beyond)
    return result


def ability(sample: Sample) -> str:
    """The ability a bundled task isolates, comparisons and films by their kind of question."""
    task = sample.task.removeprefix("vtp_")
    return f"{task}: {sample.kind}" if task in ("pairs", "video") else task


# what is written


def loss_table(found: Sequence[Mapping], order: Sequence[str]) -> str:
    """Points lost against the unpruned model, by group: * beyond noise, (-) behind `random` at the same FLOPs."""
    titles = ["method", "keep", "FLOPs", *order]
    text = ["| " + " | ".join(titles) + " |", "|" + "---|" * 2 + "---:|" * (len(order) + 1)]
    for line in sorted(found, key=_place):
        cells = [_cell(line["groups"].get(group)) for group in order]
        text.append("| " + " | ".join([line["method"], line["keep"], f"{100 * line['flops']:.0f} %", *cells]) + " |")
    return "\n".join(text)


def _place(line: Mapping) -> tuple[int, float]:
    """Order of lines: by budget, the best first, those without an answer to everything last."""
    whole = line["groups"].get("all")
    return KEEPS.index(line["keep"]), 1.0 if whole is None else -whole["accuracy"]


def _cell(loss: Mapping | None) -> str:
    if loss is None:
        return "-"
    star = "*" if Interval(**loss["lost"]).excludes_zero else ""
    return f"{100 * loss['lost']['value']:+.0f}{star}{' (-)' if _behind(loss) else ''}"


def _behind(loss: Mapping) -> bool:
    """Beyond noise worse than `random` with as many FLOPs."""
    return loss["beyond"] is not None and loss["beyond"]["high"] < 0


def weak_points(found: Sequence[Mapping]) -> str:
    """A sentence a method: the two groups that it loses most on, and those it loses nothing measurable on."""
    text = []
    for line in sorted(found, key=lambda line: line["method"]):
        groups = {name: loss for name, loss in line["groups"].items() if name != "all"}
        worst = sorted(groups, key=lambda name: groups[name]["lost"]["value"])[:2]
        lost = [name for name in worst if groups[name]["lost"]["high"] < 0]
        said = ", ".join(f"{name} ({_points(groups[name]['lost'])})" for name in lost)
        said = f"loses most on {said}" if lost else "loses nothing beyond noise in any group"
        behind = [name for name, loss in sorted(groups.items()) if _behind(loss)]
        more = f"; behind `random` at the same FLOPs: {', '.join(behind)}" if behind else ""
        text.append(f"* `{line['method']}` at {line['keep']} {said}{more}.")
    return "\n".join(text)


def _points(interval: Mapping) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:+.0f} points [{low:+.0f}, {high:+.0f}]"


def ranking_table(areas: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Methods that reach all budgets on every model by the mean of their areas."""
    models = list(areas)
    whole = [name for name in areas[models[0]] if all(name in areas[model] for model in models)]
    mean = {name: sum(areas[model][name]["value"] for model in models) / len(models) for name in whole}
    text = ["|  | method | mean | " + " | ".join(f"`{model}`" for model in models) + " |"]
    text.append("|---:|---|---:|" + "---:|" * len(models))
    for place, name in enumerate(sorted(whole, key=lambda name: -mean[name]), start=1):
        cells = [f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" for a in (areas[m][name] for m in models)]
        text.append(f"| {place} | `{name}` | {mean[name]:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def sections(data: Mapping) -> dict[str, str]:
    """The generated parts of the page by their marks."""
    parts = {"ranking": ranking_table(data["areas"])}
    for name in ("kinds", "sizes", "abilities"):
        order = list(dict.fromkeys(group for line in data[name] for group in line["groups"]))
        parts[name] = loss_table(data[name], ["all", *sorted(group for group in order if group != "all")])
        parts[f"{name}-worst"] = weak_points(data[name])
    return parts


def fill(page: str, parts: Mapping[str, str]) -> str:
    """`page` with the text between `<!-- NAME -->` and `<!-- /NAME -->` replaced.

    Raises:
        ValueError: if a mark is missing.
    """
    for name, text in parts.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, hits = pattern.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
        if hits != 1:
            raise ValueError(f"the page has the marks of {name!r} {hits} times, wanted once.")
    return page


def main() -> None:
    """Read the three sweeps, write the data and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the sweeps lie")
    runs = parser.parse_args().runs
    board = {folder.name: Sweep.read(folder) for folder in sorted((runs / "leaderboard").iterdir()) if folder.is_dir()}
    scenes = [Sweep.read(folder) for folder in sorted((runs / "kinds-scenes").iterdir()) if folder.is_dir()]
    abilities = Sweep.read(runs / "kinds-abilities")
    sizes = sizes_of_scenes(scenes[0].of(scenes[0].rows[0], "vtp_scenes"))
    found = {
        "areas": {name.replace("-", ":", 1): _plain(sweep.areas()) for name, sweep in board.items()},
        "kinds": [asdict(line) for line in lines(scenes, lambda sample: sample.kind)],
        "sizes": [asdict(line) for line in lines(scenes, lambda sample: sizes.get((sample.image_id, sample.question)))],
        "abilities": [asdict(line) for line in lines([abilities], ability)],
    }
    DATA.write_text(json.dumps(_rounded(found), indent=None) + "\n", encoding="utf-8")
    data = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), sections(data)), encoding="utf-8")


def _plain(areas: Mapping[str, Interval]) -> dict:
    return {name: asdict(interval) for name, interval in areas.items()}


def _rounded(value):
    """Figures to five places: no page shows more, and files stay readable."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
