"""Where a measurement comes from: versions, device, threads."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from vtprune import __version__

__all__ = ["provenance"]


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, device name and thread count, JSON-ready."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "versions": {
            "vtprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": {"type": device.type, "name": name},
        "threads": torch.get_num_threads(),
    }
