"""How well the exported tiny Qwen2-VL Plus answers each kind of question, with and without its pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vtprune.tiny import load_folder, vocabulary
from vtprune.tiny.exercises import KINDS, TASKS, exercise_questions
from vtprune.tiny.questions import KINDS_OF_QUESTION
from vtprune.tiny.training.packing import Batch
from vtprune.tiny.training.plus.network import WORD_IDS, View
from vtprune.tiny.training.plus.packing import exercise_batch, old_batch
from vtprune.tiny.training.plus.phase import make_views
from vtprune.tiny.training.scoring import Scores, score

_SIZE = 10
EXERCISES, SCENES, EASY, GENERATED = 120, 60, 40, 8
_QUICK = 20

Table = dict[str, dict[str, Any]]


def _batches(task: str, split: str, count: int) -> list[Batch]:
    if task == "scenes":
        return [old_batch(split, 0, first, _SIZE, 0) for first in range(0, count, _SIZE)]
    if task == "easy":
        return [old_batch(split, 0, first, _SIZE, _SIZE) for first in range(0, count, _SIZE)]
    return [exercise_batch(task, split, 0, first, _SIZE) for first in range(0, count, _SIZE)]


def _columns(task: str) -> dict[str, list[str]]:
    """Kinds of question by column of the table."""
    if task == "scenes":
        return {"scenes": list(KINDS_OF_QUESTION), "count": ["count"]}
    return {kind: [kind] for kind in KINDS.get(task, (task,))}


def _prior(batches: list[Batch], kinds: list[str]) -> float:
    """Percent of the questions that the commonest answer of their kind answers."""
    asked: dict[str, Counter[str]] = {}
    for draft in (draft for batch in batches for row in batch.drafts for draft in row if draft.kind in kinds):
        asked.setdefault(draft.kind, Counter())[draft.answer] += 1
    most = sum(max(counts.values()) for counts in asked.values())
    return round(100 * most / sum(counts.total() for counts in asked.values()), 1)


def _scores(view: View, batches: list[Batch]) -> dict[str, Scores]:
    with torch.no_grad():
        tokens = {id(batch): view.look(batch.images).tokens for batch in batches}

    def none(batch: Batch, _: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.ids), 0, dtype=torch.long)

    return {
        "all tokens": score(view, batches, lambda batch: tokens[id(batch)]),
        "no visual tokens": score(view, batches, lambda batch: tokens[id(batch)], none),
        "wrong picture": score(view, batches, lambda batch: tokens[id(batch)].roll(1, 0)),
    }


def measure(folder: Path, split: str, quick: bool) -> dict[str, Any]:
    """Everything that the card states, from the exported folder."""
    views = make_views(load_folder(folder, torch.float32))
    sizes = {**dict.fromkeys(TASKS, EXERCISES), "scenes": SCENES, "easy": EASY}
    table: Table = {}
    for task, size in sizes.items():
        batches = _batches(task, split, min(size, _QUICK) if quick else size)
        scores = _scores(views.get(task, views["scenes"]), batches)
        for column, kinds in _columns(task).items():
            table[column] = {name: part.interval(kinds) for name, part in scores.items()}
            table[column]["commonest answer"] = _prior(batches, kinds)
    return {"kinds": table, "generated": _generated(folder, split)}


def _generated(folder: Path, split: str) -> dict[str, int]:
    """The same through transformers' own front door: processor, chat template, generate()."""
    from transformers import AutoProcessor

    model: Any = load_folder(folder, torch.float32)
    processor: Any = AutoProcessor.from_pretrained(folder)
    counts = {"asked": 0, "right": 0, "stopped": 0}
    for task in TASKS:
        for frames, questions in exercise_questions(task, split, GENERATED):
            film = task == "films"
            shown = [{"type": "video"}] if film else [{"type": "image"}] * len(frames)
            media = {"videos": [frames]} if film else {"images": frames}
            for item in questions:
                message = {"role": "user", "content": [*shown, {"type": "text", "text": item.question}]}
                text = processor.apply_chat_template([message], add_generation_prompt=True)
                inputs = processor(text=[text], return_tensors="pt", **media)
                with torch.no_grad():
                    new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
                counts["asked"] += 1
                counts["right"] += new == [*vocabulary.encode(item.answer, WORD_IDS), vocabulary.EOS]
                counts["stopped"] += new[-1] == vocabulary.EOS
    return counts
