"""The model card of the tiny Qwen2-VL Plus, from the measurements and the recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from vtprune.tiny.exercises import KINDS, NEW_WORDS
from vtprune.tiny.storage import CHANGE_FILE
from vtprune.tiny.training.plus.measure import EASY, EXERCISES, SCENES
from vtprune.tiny.training.plus.recipe import ORDINAL_LAYER, READ_LAYERS, PlusRecipe

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# vtprune tiny Qwen2-VL Plus

The tiny Qwen2-VL beside it, trained further to read words, to see on which side a small ring is open, to compare two
pictures and to watch films of eight frames (`vtprune.tiny.exercises`; what each isolates: docs/tasks.md). Only a
low-rank change of its matrices and {words} more words are stored: `{file}`, {bytes} bytes. `load_tiny` adds it to the
weights of the tiny Qwen2-VL.

Through `processor` + `generate()`, in fp32: {right} of {asked} {split} questions about the first exercises right,
{stopped} answers ended with `<eos>`.

## Accuracy by kind of question (%)

Whole answers, `<eos>` included; {exercises} exercises a task, {scenes} scenes, {easy} easy-VQA pictures of the {split}
split, seed 0, used once after training. Intervals: bootstrap over exercises. "no visual tokens": the question alone.
"wrong picture": that of another exercise. "commonest answer": what always saying the commonest answer of a kind on
these very questions would score.
"""

_TRAINING = """
## Training

`python -m vtprune.tiny.training --model qwen2_vl_plus --out DIR --seed {seed}`; one process on one CPU core, no
accelerator, torch {torch}, transformers {transformers}, fp32. A killed run goes on from its last saved step. One seed
was trained; how much another seed differs is not known.

Every matrix of tower, merger and decoder becomes `base + up^T down` (rank {tower} in tower and merger, {decoder} in the
decoder); norms and biases stay. The factors are stored with {levels} whole numbers to either side of zero and trained
so over the last steps.

The training is not answer-only. Three labels of the generator help: a linear probe on the merger's input must name what
a token shows (the word, the side of the gap, the way a thing moves, that it appears or disappears); a probe on the
decoder's visual tokens at the input of layer {ordinal} must tell picture or moment; and the first two heads of one
layer by kind of question are taught where to look ({reads}, 0-based), fading out. After {tower_at} steps the tower
alone learns the first label for {tower_steps} steps while what it makes of scenes is held. Scenes and easy-VQA pictures
take part throughout, so that they are not forgotten.
"""


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else f"{value[0]:.1f} ({value[1]:.1f}-{value[2]:.1f})"


def accuracy_table(kinds: dict[str, dict[str, Any]]) -> str:
    """One line a kind of question."""
    tasks = {kind: task for task, part in KINDS.items() for kind in part}
    names = ("all tokens", "no visual tokens", "wrong picture", "commonest answer")
    lines = ["| task | kind | questions | " + " | ".join(names) + " |", "|" + " --- |" * (3 + len(names))]
    for kind, scores in kinds.items():
        cells = [_cell(scores[name]) for name in names]
        questions = scores["all tokens"][3]
        lines.append(f"| {tasks.get(kind, 'as before')} | {kind} | {questions} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(recipe: PlusRecipe, results: dict[str, Any], split: str, folder: Path) -> None:
    """Writes MODEL_CARD.md into the exported folder."""
    from vtprune.tiny.storage import CHANGE_LEVELS

    head = _HEAD.format(
        words=len(NEW_WORDS),
        file=CHANGE_FILE,
        bytes=(folder / CHANGE_FILE).stat().st_size,
        split=split,
        exercises=EXERCISES,
        scenes=SCENES,
        easy=EASY,
        **results["generated"],
    )
    new = {kind for part in KINDS.values() for kind in part}
    training = _TRAINING.format(
        seed=recipe.seed,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        tower=recipe.tower_rank,
        decoder=recipe.decoder_rank,
        levels=CHANGE_LEVELS,
        ordinal=ORDINAL_LAYER,
        reads=", ".join(f"{kind} {layer}" for kind, layer in READ_LAYERS.items() if kind in new),
        tower_at=recipe.tower_at,
        tower_steps=recipe.tower_steps,
    )
    settings = [
        "| setting | value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in asdict(recipe).items()),
    ]
    parts = [head.strip(), accuracy_table(results["kinds"]), training.strip(), "\n".join(settings)]
    (folder / "MODEL_CARD.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
