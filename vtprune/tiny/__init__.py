"""The embedded tiny VLM: a real LLaVA (CLIP ViT with CLS + Llama), trained here from nothing, 3.7 M parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import UnknownNameError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["load_tiny", "tiny_folder"]

_NAMES = ("llava",)


def tiny_folder(name: str = "llava") -> Path:
    """Folder of a shipped checkpoint, usable wherever transformers takes a model path.

    Raises:
        UnknownNameError: if no checkpoint has this name.
    """
    if name not in _NAMES:
        raise UnknownNameError("tiny model", name, _NAMES)
    return Path(__file__).parent / name


def load_tiny(name: str = "llava", *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A shipped checkpoint with its processor, from the package's own files (no network).

    Args:
        name: "llava": 128 px, 256 visual tokens, 12 decoder layers; see MODEL_CARD.md beside the weights.
        dtype: of the loaded weights, default `torch.float32` (they are stored in fp16).

    Returns:
        (model in eval mode, processor).

    Raises:
        UnknownNameError: if no checkpoint has this name; it is a ValueError and lists the legal ones.
    """
    folder = tiny_folder(name)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
