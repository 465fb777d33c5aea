"""What comes before every start of vLLM with the plugin."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune.errors import VtpruneError
from vtprune.integrations.vllm import SUPPORTED
from vtprune.integrations.vllm.embedded import export
from vtprune.integrations.vllm.images import checked_geometry
from vtprune.integrations.vllm.settings import Settings, architecture_of
from vtprune.loading import load_config

__all__ = ["checked_overrides", "served_place"]


def checked_overrides(asked: str, model: str, settings: Settings, backend: str) -> dict[str, Any]:
    """The `hf_overrides` of an engine; what cannot be served is said before vLLM is started.

    Args:
        asked: the command or option that needs vLLM, for messages.
        model: as for `vtprune.loading.load_config`.
        settings: the plugin's.
        backend: see `architecture_of`.

    Raises:
        InputError, PlanError, UnsupportedModelError: if model, method and backend do not go together.
        VtpruneError: if vLLM is not installed.
    """
    config = load_config(model)
    checked_geometry(config, settings)
    overrides = settings.overrides(architecture_of(config, backend))
    if importlib.util.find_spec("vllm") is None:
        raise VtpruneError(
            f"{asked} needs vLLM {SUPPORTED}, which is not installed. In an environment of its own: pip install "
            "'vtprune[vllm]' (docs/serving.md has the steps for CPUs)."
        )
    return overrides


@contextlib.contextmanager
def served_place(model: str) -> Iterator[str]:
    """Folder or hub id under which vLLM finds a model; embedded and random ones are exported for as long.

    Raises:
        InputError: as `export`.
    """
    if not model.startswith(("tiny:", "random:")):
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(export(model, Path(folder)))
