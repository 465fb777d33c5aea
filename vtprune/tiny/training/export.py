"""Writes the trained weights as a Hugging Face folder, and examples beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig

from vtprune.tiny import vocabulary
from vtprune.tiny.scenes import scene_questions
from vtprune.tiny.training.vlms import Vlm, vlm_class

_EXAMPLE_SEED = 7


def load_trained(name: str, weights: Path) -> Vlm:
    """The network with the weights of a `joint.pt`, fp32, in eval mode."""
    vlm = vlm_class(name)()
    vlm.hf.load_state_dict(torch.load(weights))
    return vlm.eval()


def export(name: str, weights: Path, folder: Path) -> None:
    """Writes `weights` to `folder` in fp16 with config, tokenizer, processor and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    vlm = load_trained(name, weights)
    vlm.hf.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
        pad_token_id=vocabulary.PAD,
        max_new_tokens=8,
        do_sample=False,
    )
    vlm.hf.half().save_pretrained(folder)
    vlm.build_processor().save_pretrained(folder)
    # safetensors writes 0600; everybody who installs the package must be able to read it
    (folder / "model.safetensors").chmod(0o644)


def write_examples(folder: Path, images: int = 3, per_image: int = 4) -> None:
    """Dev scenes as PNG files, with questions and answers in examples.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (image, asked) in enumerate(scene_questions("dev", images, _EXAMPLE_SEED, per_image)):
        name = f"scene_{number}.png"
        image.save(folder / name)
        entries += [
            {"image": name, "question": item.question, "answer": item.answer, "kind": item.kind} for item in asked
        ]
    (folder / "examples.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
