"""Synthetic sweep rows, and a tiny random model with a processor that can be asked questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import models
import pytest

from vtprune.budget import Geometry
from vtprune.eval import task_data
from vtprune.eval.harness import Sample, require_lmms_eval
from vtprune.eval.rows import KindScore, Row, TaskScore
from vtprune.eval.stats import Interval

TASKS = ("vtp_easy_vqa", "vtp_scenes")
RUN = {"model": "tiny:llava", "seed": 0, "limit": 50, "command": "vtprune eval --out <b>", "versions": {"torch": "2"}}
LLAVA_7B = Geometry("llava", 32, 4096, 32, 32, 128, 11008, 576)


def answered(task: str, right: int, questions: int = 100) -> list[Sample]:
    """Answers to so many questions, each on an image of its own, of which the first `right` are right."""
    return [Sample(task, i, str(i), f"question {i}", "yes", None, "", float(i < right)) for i in range(questions)]


def task_score(accuracy: float, kinds: tuple[str, ...] = ("color", "count")) -> TaskScore:
    """A score with an interval of 5 points either way."""
    return TaskScore(
        accuracy=Interval(accuracy, max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05)),
        share=accuracy / 0.9,
        difference=Interval(accuracy - 0.9, accuracy - 0.95, accuracy - 0.85),
        questions=50,
        images=40,
        kinds={kind: KindScore(accuracy, 25) for kind in kinds},
    )


def pruned_row(method: str, keep: str, value: float, accuracy: float) -> Row:
    """A cell that ran."""
    return Row(
        method,
        keep,
        value,
        tasks={task: task_score(accuracy) for task in TASKS},
        visual_tokens=256,
        average_tokens=256 * value,
        flops_share=0.1 + 0.9 * value,
        vision_flops_share=1.0,
        kv_share=0.12 + 0.88 * value,
        prefill_ratio=0.3 + 0.7 * value,
        prefill_ms=100.0,
        plan={"vtprune_plan": 1, "stages": []},
        run=RUN,
    )


def rows() -> list[Row]:
    """Unpruned, two methods at two budgets, one of the cells out of reach and one broken."""
    return [
        pruned_row("unpruned", "1", 1.0, 0.9),
        pruned_row("fastv", "1/2", 0.5, 0.8),
        Row("fastv", "1/16", 0.0625, status="not possible", message="fastv cannot reach 16", floor=22.25, run=RUN),
        pruned_row("random", "1/2", 0.5, 0.7),
        Row("random", "1/16", 0.0625, status="failed", message="Traceback\nValueError: <boom>", run=RUN),
    ]


def untimed(samples: list[Sample]) -> list[Sample]:
    """Samples without what the batch took, which differs between runs."""
    return [
        dataclasses.replace(one, counts={name: value for name, value in one.counts.items() if name != "batch"})
        for one in samples
    ]


class Silent:
    """Progress for nobody; remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def start(self, title: str, steps: int) -> None:
        self.phases.append(title)

    def step(self, title: str, count: int = 1) -> None:
        pass


def few_images(count: int) -> Iterator[None]:
    """Bundled tasks about so many images; for a fixture: importing lmms-eval takes seconds, collecting must not."""
    require_lmms_eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_data, "IMAGES", count)
        yield


def save_askable(folder: Path) -> Path:
    """The random LLaVA of `models` with a word tokenizer and an image processor, as a checkpoint folder."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    from vtprune.tiny.vocabulary import WORDS

    words = [word for word in WORDS if not word.startswith("<")]
    vocabulary = {"<pad>": models.PAD, "<bos>": 1, "<eos>": 2, "<unk>": 3, "<image>": models.IMAGE}
    vocabulary |= {word: place for place, word in enumerate(words[: models.IMAGE - 4], start=4)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    template = (
        "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "assistant :"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = 8 * models.SIDE
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    models.llava().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
