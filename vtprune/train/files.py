"""Tensors and a note about them in one safetensors file that is whole or not there at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtprune.errors import VtpruneError
from vtprune.files import partial_path, put_in_place

__all__ = ["DamagedFileError", "read_tensors", "write_tensors"]


class DamagedFileError(VtpruneError, RuntimeError):
    """A file that is not what was written there: cut off, changed, or of another program."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors and a note; a process that dies meanwhile leaves the former file as it was.

    Args:
        path: where to; its folder is made if it is not there.
        tensors: by name; on any device, they may share memory.
        note: what JSON can hold.
    """
    stored = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    text = json.dumps(note)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    save_file(stored, partial, metadata={"note": text, "checksum": _checksum(stored, text)})
    put_in_place(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, note) that `write_tensors` wrote.

    Raises:
        DamagedFileError: if the file cannot be read, or its bytes are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{str(path)!r} cannot be read: {error}.") from error
    if "note" not in metadata or metadata.get("checksum") != _checksum(tensors, metadata["note"]):
        raise DamagedFileError(f"{str(path)!r} is damaged: its checksum is not that of its content.")
    return tensors, json.loads(metadata["note"])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
