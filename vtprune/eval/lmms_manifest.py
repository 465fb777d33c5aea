"""Target of the `lmms_eval.models` entry point.

lmms-eval imports this module whenever it lists its models, so it must stay free of torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["MODEL_ID", "manifests"]

MODEL_ID = "vtprune"


_HERE = "vtprune.eval"
# (model id, chat class, simple class)
_STOCK = (
    ("vtprune_llava_hf", "LlavaHfChat", "LlavaHfSimple"),
    ("vtprune_qwen2_vl", None, "Qwen2VLSimple"),
    ("vtprune_qwen2_5_vl", "Qwen25VLChat", "Qwen25VLSimple"),
    ("vtprune_internvl_hf", "InternVLHfChat", None),
)


def manifests() -> list[ModelManifest]:
    """What lmms-eval registers: a model of our own for all families, and its own classes with pruning."""
    from lmms_eval.models.registry_v2 import ModelManifest

    def path(module: str, name: str | None) -> str | None:
        return None if name is None else f"{_HERE}.{module}.{name}"

    own = ModelManifest(
        model_id=MODEL_ID,
        chat_class_path=path("lmms_model", "VtpruneChat"),
        simple_class_path=path("lmms_model", "VtpruneSimple"),
    )
    stock = [
        ModelManifest(
            model_id=name,
            chat_class_path=path("stock_models", chat),
            simple_class_path=path("stock_models", simple),
        )
        for name, chat, simple in _STOCK
    ]
    return [own, *stock]
