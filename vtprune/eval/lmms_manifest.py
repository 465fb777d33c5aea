"""Target of the `lmms_eval.models` entry point.

lmms-eval imports this module whenever it lists its models, so it must stay free of torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["MODEL_ID", "manifests"]

MODEL_ID = "vtprune"


def manifests() -> list[ModelManifest]:
    """What lmms-eval registers: one model id with a chat and a simple class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL_ID,
            chat_class_path="vtprune.eval.lmms_model.VtpruneChat",
            simple_class_path="vtprune.eval.lmms_model.VtpruneSimple",
        )
    ]
