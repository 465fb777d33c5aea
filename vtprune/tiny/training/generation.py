"""The exported folder through transformers' own front door: AutoProcessor, chat template, generate()."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from vtprune.tiny import load_folder
from vtprune.tiny.easy_vqa import easy_vqa_questions
from vtprune.tiny.scenes import Question, scene_questions
from vtprune.tiny.training.evaluation import Sample
from vtprune.tiny.vocabulary import EOS, encode


def answer_ids(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, question: str) -> list[int]:
    """The new token ids of a greedy answer, <eos> included."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        output: torch.Tensor = model.generate(**inputs)  # type: ignore[operator]
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def measure_generation(folder: Path, sample: Sample) -> dict[str, int]:
    """How many of some test questions come out right, and how many answers stop at <eos>."""
    model = load_folder(folder, torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    entries = scene_questions(sample.split, sample.row_scenes, sample.seed)
    entries += easy_vqa_questions(sample.split, sample.row_easy, per_image=4)
    asked: list[tuple[Image.Image, Question]] = [(image, item) for image, items in entries for item in items]
    answers = [answer_ids(model, processor, image, item.question) for image, item in asked]
    right = [got == [*encode(item.answer), EOS] for got, (_, item) in zip(answers, asked, strict=True)]
    return {
        "generated": len(asked),
        "generated_right": sum(right),
        "generated_stopped": sum(got[-1] == EOS for got in answers),
    }
