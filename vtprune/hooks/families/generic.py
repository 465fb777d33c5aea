"""Any other model whose decoder keeps the usual contract: parts found by inspection, exactness proved on a dry call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from vtprune.budget import Geometry
from vtprune.cost import prefill_flops
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.decoder_geometry import decoder_geometry
from vtprune.hooks.families.base import FAMILIES, Family, Grids, Modality, Parts
from vtprune.layout import ImageGrid

_EXAMPLE = 16 * 16  # tokens of an image where the config names none
_ASSUMED = "which pixels a visual token covers is assumed from the number of tokens"
_UNTRIED = (
    "known from the config alone: the number of visual tokens is an example, and prune() tries the model on a dry call "
    "first, which may refuse it"
)
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# what may reach a decoder: everything else could carry something per token that nobody would shorten
_PLAIN = {"self", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"}
_TEXT = _PLAIN | {"input_ids", "inputs_embeds", "return_dict"}
_LAYER = _PLAIN | {"hidden_states", "position_embeddings"}


def _refuse(config: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model_type {config.model_type!r} has no family of its own and the generic one cannot serve it: {reason} "
        "vtprune.families() lists the models that are served."
    )


def _image_token(config: Any) -> int | None:
    token = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if token is None else token


def _check_text(config: Any, text: Any) -> None:
    """Refuse what a config says and a short dry call would not show.

    Raises:
        UnsupportedModelError: with the reason.
    """
    missing = [name for name in _NEEDED if not isinstance(getattr(text, name, None), int)]
    if missing:
        raise _refuse(config, f"the config of its {text.model_type!r} decoder has no {', no '.join(missing)}.")
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise _refuse(config, "its text model is an encoder and a decoder.")
    kinds = getattr(text, "layer_types", None)
    odd: list[str] = sorted(set(kinds or ()) - {"full_attention"})
    if getattr(text, "attention_chunk_size", None) is not None:
        odd.append("attention_chunk_size")
    if kinds is None and getattr(text, "sliding_window", None) is not None:
        odd.append("sliding_window")
    if odd:
        raise _refuse(config, f"its decoder has layers that do not attend to everything ({', '.join(odd)}).")
    rotary = [getattr(text, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    if any("mrope_section" in entry for entry in rotary):
        raise _refuse(config, "its rotary positions have several axes (mrope_section).")


def _assumed(tokens: int, square: bool) -> Grids:
    side = math.isqrt(tokens)
    rows = side if square and side**2 == tokens else 1
    return (ImageGrid(rows, tokens // rows, assumed=True),)


@FAMILIES.register("generic")
class Generic(Family):
    """Serves what no named family serves, or refuses with a reason.

    Which pixels a token covers is assumed: a run of placeholders is a square image if its length is a square, else (and
    in videos) a single row. Exactness does not hang on it, only what methods that read the grid choose, and what is
    drawn.
    """

    name = "generic"
    model_types = ()
    summary = "any other image-text model with a Llama-like decoder (parts found by inspection, grids assumed)"
    images_differ = False
    proves_itself = True

    @classmethod
    def matches(cls, config: Any) -> bool:
        """See `Family.matches`: vision beside text, and nobody else's."""
        others = (family for _, family in FAMILIES.items() if family is not cls)
        sees = _image_token(config) is not None or getattr(config, "vision_config", None) is not None
        return sees and not any(family.matches(config) for family in others)

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`. The number of visual tokens is an example."""
        text = getattr(config, "text_config", None) or config
        _check_text(config, text)
        tokens = getattr(config, "image_seq_length", None)
        shape = decoder_geometry(cls.name, text, tokens if isinstance(tokens, int) else _EXAMPLE, dynamic=True)
        return dataclasses.replace(shape, notes=(_ASSUMED, _UNTRIED))

    def __init__(self, model: nn.Module) -> None:
        # a generate() of its own may run the decoder behind the root's back
        generate: Any = getattr(type(model), "generate", None)
        if generate is not None and not generate.__module__.startswith("transformers.generation"):
            raise _refuse(model.config, f"{type(model).__name__} has a generate() of its own.")
        super().__init__(model)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """See `Family.part_names`."""
        return ()

    def find_parts(self, root: Any) -> Parts:
        """See `Family.find_parts`."""
        if _image_token(self.config) is None:
            raise _refuse(self.config, "its config has no image_token_id (the placeholder of visual tokens).")
        accepts = inspect.signature(type(root).forward).parameters
        missing = [n for n in ("input_ids", "inputs_embeds", "past_key_values", "pixel_values") if n not in accepts]
        if missing:
            raise _refuse(self.config, f"{type(root).__name__}.forward takes no {', no '.join(missing)}.")
        kinds = [name for name in accepts if "token_type_ids" in name]
        if kinds:
            raise _refuse(
                self.config,
                f"{type(root).__name__}.forward takes {', '.join(kinds)}: its visual tokens have masks or positions of "
                "their own.",
            )
        text = getattr(root, "language_model", None) or getattr(root, "text_model", None)
        if text is None:
            raise _refuse(self.config, f"{type(root).__name__} has no language_model and no text_model.")
        text = text if hasattr(text, "layers") else getattr(text, "model", text)
        absent = [name for name in ("layers", "rotary_emb") if not hasattr(text, name)]
        if absent:
            raise _refuse(self.config, f"its text model {type(text).__name__} has no {', no '.join(absent)}.")
        return Parts(root=root, text_model=text, layers=self._layers(text), rotary=text.rotary_emb)

    def _layers(self, text: Any) -> tuple[nn.Module, ...]:
        """The decoder layers, which keep the usual contract as far as their signatures tell."""
        self._check_arguments(text, _TEXT)
        layers, wanted = tuple(text.layers), self.geometry(self.config).layers
        if len(layers) != wanted:
            raise _refuse(self.config, f"its text model has {len(layers)} layers, but its config says {wanted}.")
        for layer in {type(layer): layer for layer in layers}.values():
            if not hasattr(layer, "self_attn"):
                raise _refuse(self.config, f"its decoder layer {type(layer).__name__} has no self_attn.")
            self._check_arguments(layer, _LAYER)
        return layers

    def _check_arguments(self, module: nn.Module, known: set[str]) -> None:
        parameters = inspect.signature(type(module).forward).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        extra = [name for name in names if name not in known and not name.startswith("output_")]
        if extra:
            raise _refuse(
                self.config,
                f"{type(module).__name__}.forward takes {', '.join(extra)}, which may hold something per token that "
                "nobody would shorten.",
            )

    def modalities(self) -> tuple[Modality, ...]:
        """See `Family.modalities`."""
        return self._modalities

    @functools.cached_property
    def _modalities(self) -> tuple[Modality, ...]:
        # every call of the model asks, and reading a signature takes its time
        found = [Modality("image", _image_token(self.config), "pixel_values")]  # type: ignore[arg-type]
        accepts = inspect.signature(type(self._parts.root).forward).parameters
        video = getattr(self.config, "video_token_id", None)
        if video not in (None, found[0].token) and "pixel_values_videos" in accepts:
            found.append(Modality("video", video, "pixel_values_videos"))
        return tuple(found)

    def grids(self, modality: Modality, arguments: Mapping[str, Any]) -> list[Grids]:
        """See `Family.grids`. A run of placeholders is an image: pixels and features may hold padding beside images."""
        marks = self._placeholders(modality.token, arguments.get("input_ids"), arguments.get("inputs_embeds"))
        edges = nn.functional.pad(marks.int(), (1, 1)).diff()
        runs = (edges < 0).nonzero()[:, 1] - (edges > 0).nonzero()[:, 1]
        return [_assumed(run, square=modality.name == "image") for run in runs.tolist()]

    def carried(self, arguments: Mapping[str, Any]) -> dict[int, list[Grids]]:
        """See `Family.carried`."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        result: dict[int, list[Grids]] = {}
        for modality in self.modalities():
            pixels = arguments.get(modality.pixels)
            there = encoded.get(modality.name) is not None or (pixels is not None and len(pixels) > 0)
            result[modality.token] = self.grids(modality, arguments) if there else []
        return result

    def own_geometry(self) -> Geometry:
        """See `Family.own_geometry`; notes where the layers hold other weights than the config says."""
        geometry = super().own_geometry()
        attention = 4 * geometry.heads * geometry.head_dim * geometry.layers
        counted = prefill_flops(geometry, [1] * geometry.layers) - attention
        held = 2 * sum(p.numel() for layer in self._parts.layers for p in layer.parameters() if p.ndim > 1)
        notes: tuple[str, ...] = (_ASSUMED,)
        if abs(counted - held) > 0.01 * held:
            notes += (
                f"FLOPs are counted for a dense decoder of the config's sizes; its layers hold {held / counted:.3g} "
                "times the weights of one",
            )
        return dataclasses.replace(geometry, notes=notes)
