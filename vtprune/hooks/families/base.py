"""What the engine asks of an architecture family."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from vtprune.budget import Geometry
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.hooks.placeholders import Grids, deal_images
from vtprune.hooks.units import Medium, Tower, Unit, raster
from vtprune.hooks.windows import Blocks
from vtprune.layout import ImageGrid, Layout, opening
from vtprune.registry import Registry

__all__ = ["FAMILIES", "Family", "Grids", "Modality", "Parts", "Prompt", "family_of"]


@dataclass(frozen=True)
class Modality:
    """Images or videos.

    Attributes:
        name: "image" or "video", as in `get_image_features`.
        token: id of the placeholder.
        pixels: the argument that carries them.
    """

    name: str
    token: int
    pixels: str


@dataclass(frozen=True)
class Parts:
    """The modules that hooks go on.

    Attributes:
        root: sees `input_ids`, images and the cache; runs the text model.
        text_model: runs the decoder layers on `inputs_embeds`.
        layers: decoder layers; `attention(layer)` is each one's attention module.
        rotary: maps (hidden, position_ids) to (cos, sin).
        windows: sliding window of each decoder layer, see `Geometry`.
        ready_masks: the root hands the text model masks that follow from `windows` and `Family.blocks`.
        tower: the vision side, where the family opens it.
        video_tower: where videos have a tower of their own; it has the shape of the other and shares its projector.
    """

    root: nn.Module
    text_model: nn.Module
    layers: tuple[nn.Module, ...]
    rotary: nn.Module
    windows: tuple[int | None, ...] = ()
    ready_masks: bool = False
    tower: Tower | None = None
    video_tower: Tower | None = None


@dataclass(frozen=True)
class Prompt:
    """One call of the root, as the family reads it.

    Attributes:
        visual: [B, N] True at image placeholders, or None if the call carries no image and holds a single token.
        input_ids: [B, N], or None if embeddings were passed.
        attention_mask: what the caller passed, or None.
        cache: the KV cache passed in, or None.
        batch: B.
        carried: images and videos that the call carries.
        images: for each sample its images, () if `visual` is None.
        counts: placeholders of each sample, () if `visual` is None.
        blocks: tokens that see each other in both directions, or None.
    """

    visual: Tensor | None
    input_ids: Tensor | None
    attention_mask: Tensor | None
    cache: Any
    batch: int
    carried: int
    images: tuple[tuple[Grids, ...], ...] = ()
    counts: tuple[int, ...] = ()
    blocks: Blocks | None = None

    @property
    def opening(self) -> tuple[int, ...]:
        """For each sample its tokens of still images and first frames: see `Geometry`."""
        return tuple(
            opening([i for i, grids in enumerate(images) for _ in grids], [g for grids in images for g in grids])
            for images in self.images
        )

    def layout(self, real: Tensor) -> Layout:
        """Which pixels each placeholder covers. `real` is [B, N], False at padding."""
        if self.visual is None:
            raise InputError("this call has no image placeholders to lay out.")
        return Layout.from_images(self.visual, real, self.images)


class Family(ABC):
    """Facts about one architecture family. Built for one model; raises if the model is a variant it refuses.

    Attributes:
        name: registry key.
        summary: one line for listings.
        model_types: `config.model_type` of the models it serves.
        images_differ: images have grids of their own sizes, which encoded features alone do not tell.
        proves_itself: nobody has tested these models, so that each is tried on a dry call when it is wrapped.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    images_differ: ClassVar[bool] = True
    proves_itself: ClassVar[bool] = False

    @classmethod
    def matches(cls, config: Any) -> bool:
        """True if this family serves models with this config."""
        return getattr(config, "model_type", None) in cls.model_types

    @classmethod
    @abstractmethod
    def geometry(cls, config: Any) -> Geometry:
        """The shape of the model, from its config alone.

        Raises:
            UnsupportedModelError: if the config selects a variant that the family refuses.
        """

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = model.config
        self._book: MutableMapping[Tensor, Grids] = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        shape = self.geometry(self.config)
        root: Any = getattr(model, "model", model)
        missing = [part for part in self.part_names() if not hasattr(root, part)]
        if missing:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {' and no '.join(missing)}. Pass the model for conditional generation "
                f"of this family ({self.summary}) or its .model."
            )
        self._parts = dataclasses.replace(self.find_parts(root), windows=shape.windows)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """Attributes that the root module must have."""
        return ("language_model", "vision_tower", "multi_modal_projector")

    def find_parts(self, root: Any) -> Parts:
        """The modules of this model, found from its root."""
        text = root.language_model
        return Parts(root=root, text_model=text, layers=tuple(text.layers), rotary=text.rotary_emb)

    def own_geometry(self) -> Geometry:
        """The shape of this very model; unless overridden what its config says."""
        return self.geometry(self.config)

    def parts(self) -> Parts:
        """The modules of this model."""
        return self._parts

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a tower block or decoder layer."""
        return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The feed-forward module of a decoder layer.

        Raises:
            UnsupportedModelError: if it has none of a known name.
        """
        names = ("mlp", "feed_forward", "block_sparse_moe")
        for name in names:
            if hasattr(layer, name):
                return getattr(layer, name)
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no feed-forward module named {', '.join(names)}. Use a method that does not "
            "read what sublayers do, such as fastv."
        )

    def modalities(self) -> tuple[Modality, ...]:
        """What the model sees; unless overridden images."""
        return (Modality("image", self.config.image_token_id, "pixel_values"),)

    @abstractmethod
    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """The grids of each image (or video) of a call that carries pixels.

        Raises:
            InputError: if the arguments ask for a variant that pruning was not planned on, or sizes are missing.
        """

    def media(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Medium]:
        """What the tower makes of a call that carries pixels; unless overridden, a unit of each grid."""
        return [Medium(tuple(self.unit(grid) for grid in grids)) for grids in self.grids(modality, arguments)]

    def unit(self, grid: ImageGrid) -> Unit:
        """How the tower orders the patches of a grid; unless overridden a token is a patch, row by row."""
        return raster(grid.rows, grid.cols)

    def remember(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> None:
        """Note which grids the features have that `get_image_features(**arguments)` returned, if they do not tell."""
        features = output.pooler_output
        if isinstance(features, (list, tuple)):
            for feature, mine in zip(features, self.grids(modality, arguments), strict=True):
                self._book[feature] = mine

    def grids_of_features(self, features: Any) -> list[Grids]:
        """The grids of each image of a call that carries features which `generate` has encoded.

        Raises:
            InputError: if they were not encoded under this session.
        """
        known = [self._book.get(feature) for feature in features]
        if None in known:
            raise InputError(
                f"the call carries encoded features of {len(known)} image(s), of which {known.count(None)} were not "
                "encoded while this session was attached, so that nobody knows which pixels they cover. Encode them "
                "under the session, or pass pixels."
            )
        return [grids for grids in known if grids is not None]

    def carried(self, arguments: Mapping[str, Any]) -> dict[int, list[Grids]]:
        """Placeholder token id -> the grids of each image (or video) that the call carries for it."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        result: dict[int, list[Grids]] = {}
        for modality in self.modalities():
            output, pixels = encoded.get(modality.name), arguments.get(modality.pixels)
            mine: list[Grids] = []
            if output is not None:
                mine = self.grids_of_features(output.pooler_output)
            elif pixels is not None and len(pixels):
                mine = self.grids(modality, arguments)
            # an empty entry stands for a sample without images; two modalities may share a placeholder
            result.setdefault(modality.token, []).extend(grids for grids in mine if grids)
        return result

    def prompt(self, arguments: Mapping[str, Any]) -> Prompt:
        """Read the root's arguments (by name).

        Raises:
            InputError: if placeholders and images do not match.
        """
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        carried = self.carried(arguments)
        number = sum(len(images) for images in carried.values())
        tokens: Tensor | None = ids if ids is not None else embeds
        if tokens is None:
            raise InputError("the model was called without input_ids and inputs_embeds; pass one of them.")
        if tokens.shape[0] == 0:
            raise InputError(f"the batch must hold at least one sample, got an input of shape {tuple(tokens.shape)}.")
        cache = arguments.get("past_key_values")
        # a continued conversation without a new image is text, whatever tokens the model may have sampled
        continued = not number and cache is not None and cache.get_seq_length() > 0
        mask, batch = arguments.get("attention_mask"), tokens.shape[0]
        if not number and (tokens.shape[1] == 1 or continued):
            return Prompt(None, ids, mask, cache, batch, number)
        kinds = {token: self._placeholders(token, ids, embeds) for token in carried}
        visual = torch.stack(list(kinds.values())).any(0)
        counts = visual.sum(1).tolist()
        images = deal_images(kinds, visual, carried, counts)
        blocks = self.blocks(arguments)
        return Prompt(visual, ids, mask, cache, batch, number, images, tuple(counts), blocks)

    def blocks(self, arguments: Mapping[str, Any]) -> Blocks | None:
        """The tokens of a prompt that see each other in both directions, or None if there are none."""
        return None

    def _placeholders(self, token: int, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if ids is not None:
            return ids == token
        # transformers finds placeholders in embeddings the same way
        wanted = torch.tensor(token, device=embeds.device)  # type: ignore[union-attr]
        return (embeds == self._parts.text_model.get_input_embeddings()(wanted)).all(-1)  # type: ignore[operator]


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
