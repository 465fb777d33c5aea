"""The embedded tiny VLMs: real LLaVA, Qwen2-VL and InternVL classes, trained here, 3.7 to 4 M parameters each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import UnknownNameError, VtpruneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["load_tiny", "tiny_folder", "tiny_model_types"]

_PACKAGE = Path(__file__).parent
_NAMES = ("llava", "qwen2_vl", "internvl")
# stored as a change of another one's weights
_BASE = {"qwen2_vl_plus": "qwen2_vl"}
# their processors also know videos, which transformers reads with torchvision
_NEED_TORCHVISION = ("qwen2_vl", "internvl", "qwen2_vl_plus")


def tiny_folder(name: str = "llava") -> Path:
    """Folder of a shipped checkpoint.

    "llava" can be used wherever transformers takes a model path. The weights of the others are stored in int8, or as a
    change of another one's (`vtprune.tiny.storage`): for such a folder call `save_pretrained` on what `load_tiny`
    returns.

    Raises:
        UnknownNameError: if no checkpoint has this name.
    """
    if name not in (*_NAMES, *_BASE):
        raise UnknownNameError("tiny model", name, (*_NAMES, *_BASE))
    return _PACKAGE / name


def tiny_model_types() -> dict[str, str]:
    """The checkpoints with weights of their own that this installation holds: name to `model_type`.

    On them every method is verified. "qwen2_vl_plus" is one of them with other weights.
    """
    configs = {name: tiny_folder(name) / "config.json" for name in _NAMES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))["model_type"]
        for name, path in configs.items()
        if path.is_file()
    }


def load_tiny(name: str = "llava", *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A shipped checkpoint with its processor, from the package's own files (no network).

    Args:
        name: "llava" (128 px, 256 visual tokens), "qwen2_vl" (any size from 144 px, 2x2 patches a token, M-RoPE) or
            "internvl" (144 px, pixel shuffle, 81 visual tokens); 12 decoder layers each, see MODEL_CARD.md beside the
            weights. "qwen2_vl_plus" is "qwen2_vl", trained further to read words, see fine detail, compare two
            pictures and watch films (docs/tasks.md).
        dtype: of the loaded weights, default `torch.float32` (they are stored in fp16, or in int8).

    Returns:
        (model in eval mode, processor).

    Raises:
        UnknownNameError: if no checkpoint has this name; it is a ValueError and lists the legal ones.
        VtpruneError: if its processor needs torchvision, which is not installed, or if it is not part of this
            installation.
    """
    folder = tiny_folder(name)
    if not (folder / "config.json").is_file():
        raise VtpruneError(
            f"the embedded {name!r} is not part of this installation; there are {', '.join(tiny_model_types())}."
        )
    if name in _NEED_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        raise VtpruneError(
            f"the processor of the embedded {name!r} needs torchvision. Install the torchvision that belongs to your "
            "torch, or use load_tiny('llava')."
        )
    import torch
    from transformers import AutoProcessor

    return load_folder(folder, dtype or torch.float32), AutoProcessor.from_pretrained(folder)


def load_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder, however its weights are stored (`vtprune.tiny.storage`)."""
    import transformers

    from vtprune.tiny.storage import CHANGE_FILE, FILE, apply_change, read_weights

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    if (folder / CHANGE_FILE).is_file():
        base = read_weights(tiny_folder(_BASE[folder.name]) / FILE)
        weights = apply_change(base, read_weights(folder / CHANGE_FILE))
    elif (folder / FILE).is_file():
        weights = read_weights(folder / FILE)
    else:
        return model_class.from_pretrained(folder, dtype=dtype).eval()
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()
