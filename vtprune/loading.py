"""Models by one short text: the embedded one, a hub id, a folder, or a shape with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["SPEC_HELP", "load_config", "load_model", "parse_dtype"]

SPEC_HELP = (
    "tiny:llava, tiny:qwen2_vl, tiny:internvl or tiny:qwen2_vl_plus (embedded), a Hugging Face id or folder, or "
    "random:llama-0.3b (random weights)"
)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_dtype(name: str) -> torch.dtype | None:
    """`float32`, `bfloat16` or `float16` as a torch dtype; None for `auto`.

    Raises:
        InputError: on any other name.
    """
    import torch

    if name not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}.")
    return None if name == "auto" else getattr(torch, name)


def _check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device must be cpu, cuda, cuda:0, mps or the like, got {device!r}.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but torch sees no CUDA device. Use --device cpu.")


def _pretrained(spec: str) -> str:
    """A hub id or a folder, checked as far as it can be without the network."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"the folder {spec!r} holds no config.json. Pass a folder written by save_pretrained().")
        return str(folder)
    if folder.is_absolute() or spec.startswith((".", "~")):
        raise InputError(f"there is no model folder {spec!r}.")
    return spec


def _embedded(name: str) -> str:
    """The folder of an embedded model."""
    from vtprune.tiny import tiny_folder

    folder = tiny_folder(name)
    if not (folder / "config.json").is_file():
        raise InputError(f"the embedded model 'tiny:{name}' is not part of this installation. Pass {SPEC_HELP}.")
    return str(folder)


def load_config(spec: str = "tiny:llava") -> Any:
    """The HF config a spec stands for; no weights are read.

    Args:
        spec: `tiny:<name>`, `random:<preset>`, a hub id or a folder.

    Raises:
        InputError: if the model is not there.
        UnknownNameError: if there is no such embedded model or preset.
    """
    kind, _, name = spec.partition(":")
    if kind == "random":
        from vtprune.presets import preset_config

        return preset_config(name)
    source = _embedded(name) if kind == "tiny" else _pretrained(spec)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(spec, error)) from error


def load_model(
    spec: str = "tiny:llava",
    *,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """A model in eval mode, and its processor.

    Args:
        spec: `tiny:<name>`, `random:<preset>`, a hub id or a folder.
        device: where the model goes; the CPU if None.
        dtype: of the weights: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        attn_implementation: HF attention backend; HF's choice if None.
        device_map: how a checkpoint is laid out over several devices, such as "auto" (needs accelerate); one whole
            model on `device` if None.

    Returns:
        (model, processor); the processor of a random preset is None, see `vtprune.presets.random_inputs`.

    Raises:
        InputError: if the model, the dtype or the device is not there.
        UnknownNameError: if there is no such embedded model or preset.
        UnsupportedModelError: if the checkpoint is not an image-text-to-text model.
    """
    torch_dtype = parse_dtype(dtype)
    _check_device(device)
    kind, _, name = spec.partition(":")
    if device_map is not None and kind in ("tiny", "random"):
        raise InputError(f"device_map spreads a checkpoint over devices; {spec!r} fits one. Leave --device-map out.")
    if kind == "random":
        from vtprune.presets import build_random

        model = build_random(name, dtype=torch_dtype, device=device, attn_implementation=attn_implementation)
        return model, None
    if kind == "tiny":
        from vtprune.tiny import load_tiny

        _ = _embedded(name)
        model, processor = load_tiny(name, dtype=torch_dtype)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(device or "cpu"), processor  # type: ignore[arg-type]
    return _load_pretrained(spec, device, torch_dtype, attn_implementation, device_map)


def _load_pretrained(
    spec: str, device: str | None, dtype: torch.dtype | None, attn: str | None, device_map: str | None
) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = _pretrained(spec)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if attn is not None:
        options["attn_implementation"] = attn
    if device_map is not None:
        options["device_map"] = device_map
    try:
        # safetensors only: a pickle can run code
        model: Any = AutoModelForImageTextToText.from_pretrained(source, use_safetensors=True, **options)
        processor = AutoProcessor.from_pretrained(source)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            given = str(error).split("for this kind")[0].strip()
            raise UnsupportedModelError(f"{spec!r} is not an image-text-to-text model: {given}.") from error
        raise InputError(_not_loaded(spec, error)) from error
    except OSError as error:
        raise InputError(_not_loaded(spec, error)) from error
    return (model if device_map is not None else model.to(device or "cpu")).eval(), processor


def _not_loaded(spec: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"could not load the model {spec!r}: {reason} Pass {SPEC_HELP}."
