"""What the engine asks of an architecture family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.budget import Geometry
from vtprune.errors import UnsupportedModelError
from vtprune.layout import Layout
from vtprune.registry import Registry

__all__ = ["FAMILIES", "Family", "Parts", "Prompt", "family_of"]


@dataclass(frozen=True)
class Parts:
    """The modules that hooks go on.

    Attributes:
        root: sees `input_ids`, images and the cache; runs the text model.
        text_model: runs the decoder layers on `inputs_embeds`.
        layers: decoder layers; `attention(layer)` is each one's attention module.
        rotary: maps (hidden, position_ids) to (cos, sin).
        tower, blocks, projector: vision side; a projector row is one visual token.
    """

    root: nn.Module
    text_model: nn.Module
    layers: tuple[nn.Module, ...]
    rotary: nn.Module
    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    projector: nn.Module


@dataclass(frozen=True)
class Prompt:
    """One call of the root, as the family reads it.

    Attributes:
        visual: [B, N] True at image placeholders, or None if the call carries no image and holds a single token.
        input_ids: [B, N], or None if embeddings were passed.
        attention_mask: what the caller passed, or None.
        cache: the KV cache passed in, or None.
        images: number of images the call carries, 0 if none.
        batch: B.
        counts: placeholders of each sample, () if `visual` is None.
    """

    visual: Tensor | None
    input_ids: Tensor | None
    attention_mask: Tensor | None
    cache: Any
    images: int
    batch: int
    counts: tuple[int, ...] = ()


class Family(ABC):
    """Facts about one architecture family. Built for one model; raises if the model is a variant it refuses."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    @abstractmethod
    def matches(cls, config: Any) -> bool:
        """True if this family serves models with this config."""

    @classmethod
    @abstractmethod
    def geometry(cls, config: Any) -> Geometry:
        """The shape of the model, from its config alone.

        Raises:
            UnsupportedModelError: if the config selects a variant that the family refuses.
        """

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @abstractmethod
    def parts(self) -> Parts:
        """The modules of this model."""

    @abstractmethod
    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a tower block or decoder layer."""

    @abstractmethod
    def prompt(self, arguments: Mapping[str, Any]) -> Prompt:
        """Read the root's arguments (by name).

        Raises:
            InputError: if placeholders and images do not match.
        """

    @abstractmethod
    def layout(self, prompt: Prompt, real: Tensor) -> Layout:
        """Which pixels each placeholder covers. `real` is [B, N], False at padding."""


FAMILIES: Registry[Family] = Registry("family", "vtprune.hooks.families")


def family_of(config: Any) -> type[Family]:
    """The family that serves a model with this config.

    Raises:
        UnsupportedModelError: if none does; the message lists the supported ones.
    """
    for _, family in FAMILIES.items():
        if family.matches(config):
            return family
    kind = getattr(config, "model_type", type(config).__name__)
    legal = "; ".join(f"{name}: {family.summary}" for name, family in FAMILIES.items())
    raise UnsupportedModelError(f"no family serves model_type {kind!r}. Supported: {legal}.")
