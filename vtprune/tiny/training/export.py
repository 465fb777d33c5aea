"""Writes the trained weights as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from vtprune.tiny import load_folder, vocabulary
from vtprune.tiny.storage import FILE, write_weights
from vtprune.tiny.training.vlms import Vlm, vlm_class


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
