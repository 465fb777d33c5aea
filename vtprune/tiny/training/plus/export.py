"""Writes the trained change as a checkpoint folder that `load_tiny` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig

from vtprune.tiny import vocabulary
from vtprune.tiny.storage import CHANGE_FILE, write_weights
from vtprune.tiny.training.plus.network import build, build_processor
from vtprune.tiny.training.plus.phase import STATE


def shipped_name(name: str) -> str:
    """A weight's name in checkpoint files, which transformers maps to its own when it loads them."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def export(run: Path, folder: Path) -> None:
    """Config, tokenizer, processor and chat template, and the change of the weights of the tiny Qwen2-VL."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build()
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary.BOS,
        eos_token_id=vocabulary.EOS,
        pad_token_id=vocabulary.PAD,
        max_new_tokens=8,
        do_sample=False,
    )
    # writes the configs; the weights are those before training and do not ship
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    change = torch.load(run / STATE)["change"]
    write_weights({shipped_name(name): value for name, value in change.items()}, folder / CHANGE_FILE)
    build_processor().save_pretrained(folder)
