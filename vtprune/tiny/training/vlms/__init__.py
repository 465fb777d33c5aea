"""The networks that the recipe trains, by the name under which they ship."""

from __future__ import annotations

from vtprune.errors import UnknownNameError
from vtprune.tiny.training.vlms.base import Encoded, TokenGrid, Vlm
from vtprune.tiny.training.vlms.internvl import InternVL
from vtprune.tiny.training.vlms.llava import Llava
from vtprune.tiny.training.vlms.qwen2_vl import Qwen2VL

__all__ = ["VLMS", "Encoded", "TokenGrid", "Vlm", "vlm_class"]

VLMS: dict[str, type[Vlm]] = {cls.name: cls for cls in (Llava, Qwen2VL, InternVL)}


def vlm_class(name: str) -> type[Vlm]:
    """The network of this name.

    Raises:
        UnknownNameError: if the recipe trains none of this name.
    """
    if name not in VLMS:
        raise UnknownNameError("tiny model", name, tuple(VLMS))
    return VLMS[name]
