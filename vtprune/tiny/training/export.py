"""Writes the trained weights as a Hugging Face folder, and examples beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from vtprune.tiny import load_folder, vocabulary
from vtprune.tiny.scenes import scene_questions
from vtprune.tiny.storage import FILE, write_weights
from vtprune.tiny.training.vlms import Vlm, vlm_class

_EXAMPLE_SEED = 7


def load_exported(name: str, folder: Path) -> Vlm:
    """The network with the weights that `export` wrote, run in fp32, in eval mode."""
    vlm = vlm_class(name)()
    vlm.hf = load_folder(folder, torch.float32)
    return vlm.eval()


def export(name: str, weights: Path, folder: Path) -> None:
    """Writes the weights of a `joint.pt` to `folder`, with config, tokenizer, processor and chat template.

    Those of the tiny LLaVA in fp16, as transformers stores them; the others in int8, so that all fit in 15 MB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vlm = vlm_class(name)()
    vlm.hf.load_state_dict(torch.load(weights))
    vlm.hf.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
        pad_token_id=vocabulary.PAD,
        max_new_tokens=8,
        do_sample=False,
    )
    native = folder / "model.safetensors"
    if vlm.stored_in_int8:
        vlm.hf.save_pretrained(folder)
        write_weights(load_file(native), folder / FILE)
        native.unlink()
    else:
        vlm.hf.half().save_pretrained(folder)
        # safetensors writes 0600; everybody who installs the package must be able to read it
        native.chmod(0o644)
    vlm.build_processor().save_pretrained(folder)


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
