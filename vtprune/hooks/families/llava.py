"""LLaVA-1.5 in its Hugging Face class: CLIP or SigLIP tower, two-layer projector, Llama / Mistral / Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.budget import Geometry, VisionGeometry
from vtprune.errors import InputError, UnsupportedModelError
from vtprune.hooks.families.base import FAMILIES, Family, Parts, Prompt
from vtprune.layout import ImageGrid, Layout

_TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # model_type: has a CLS token
_DECODERS = ("llama", "mistral", "qwen2")


@FAMILIES.register("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration`, one grid of patches an image, one placeholder a patch."""

    name = "llava"
    summary = "LlavaForConditionalGeneration (CLIP or SigLIP tower; Llama, Mistral or Qwen2 decoder)"

    def __init__(self, model: nn.Module) -> None:
        self._config: Any = model.config
        geometry = self.geometry(self._config)
        side = int(geometry.visual_tokens**0.5)
        self._grid = ImageGrid(side, side)
        root: Any = getattr(model, "model", model)
        if not all(hasattr(root, part) for part in ("language_model", "vision_tower", "multi_modal_projector")):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language_model, vision_tower and multi_modal_projector. "
                "Pass a LlavaForConditionalGeneration or its .model."
            )
        tower = root.vision_tower
        # the tower lost one level of nesting between transformers releases
        encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder
        text = root.language_model
        self._parts = Parts(
            root=root,
            text_model=text,
            layers=tuple(text.layers),
            rotary=text.rotary_emb,
            tower=tower,
            blocks=tuple(encoder.layers),
            projector=root.multi_modal_projector,
        )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """See `Family.matches`."""
        return getattr(config, "model_type", None) == "llava"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """See `Family.geometry`."""
        text, vision = config.text_config, config.vision_config
        if text.model_type not in _DECODERS:
            raise UnsupportedModelError(
                f"llava with a {text.model_type!r} decoder is not supported; supported: {', '.join(_DECODERS)}."
            )
        if vision.model_type not in _TOWERS:
            raise UnsupportedModelError(
                f"llava with a {vision.model_type!r} tower is not supported; supported: {', '.join(_TOWERS)}."
            )
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()) or (
            text.model_type == "mistral" and text.sliding_window is not None
        ):
            raise UnsupportedModelError(
                f"llava with sliding-window attention (window {text.sliding_window}) is not supported: a window "
                "counts positions that pruning removes. Set text_config.sliding_window=None if prompts stay shorter."
            )
        has_cls = _TOWERS[vision.model_type]
        wanted = "default" if has_cls else "full"
        if config.vision_feature_select_strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a "
                f"{vision.model_type} tower does not give one token a patch; use {wanted!r} with this tower."
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer must be one layer, got {config.vision_feature_layer}: features of several "
                "layers cannot be pruned consistently."
            )
        layer, blocks = config.vision_feature_layer, vision.num_hidden_layers
        side = vision.image_size // vision.patch_size
        heads = text.num_attention_heads
        return Geometry(
            family=cls.name,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate=text.intermediate_size,
            visual_tokens=side * side,
            vision=VisionGeometry(
                blocks=blocks,
                # hidden_states[i] is the output of block i - 1, and there are blocks + 1 of them
                feature_block=(layer if layer >= 0 else blocks + 1 + layer) - 1,
                hidden=vision.hidden_size,
                heads=vision.num_attention_heads,
                intermediate=vision.intermediate_size,
                has_cls=has_cls,
                patch_dim=vision.num_channels * vision.patch_size**2,
                projector=(vision.hidden_size, text.hidden_size, text.hidden_size),
            ),
        )

    def parts(self) -> Parts:
        """See `Family.parts`."""
        return self._parts

    def attention(self, block: nn.Module) -> nn.Module:
        """See `Family.attention`."""
        return block.self_attn  # type: ignore[return-value]

    def prompt(self, arguments: Mapping[str, Any]) -> Prompt:
        """See `Family.prompt`."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        pixels = arguments.get("pixel_values")
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        features = None if encoded is None else [len(f) for f in encoded.pooler_output]
        images = len(features) if features is not None else 0 if pixels is None else pixels.shape[0]
        tokens: Tensor | None = ids if ids is not None else embeds
        if tokens is None:
            raise InputError("the model was called without input_ids and inputs_embeds; pass one of them.")
        visual, cache = None, arguments.get("past_key_values")
        if tokens.shape[0] == 0:
            raise InputError(f"the batch must hold at least one sample, got an input of shape {tuple(tokens.shape)}.")
        # a continued conversation without a new image is text, whatever tokens the model may have sampled
        continued = not images and cache is not None and cache.get_seq_length() > 0
        if images or (tokens.shape[1] > 1 and not continued):
            visual = self._placeholders(ids, embeds)
        counts: tuple[int, ...] = ()
        if visual is not None:
            counts = tuple(visual.sum(1).tolist())
            self._check_counts(list(counts), images, features)
        layer = arguments.get("vision_feature_layer")
        if layer is not None and layer != self._config.vision_feature_layer:
            raise InputError(
                f"vision_feature_layer={layer} differs from the config's {self._config.vision_feature_layer}, on which "
                "the pruning was planned. Set it in the config before prune()."
            )
        return Prompt(visual, ids, arguments.get("attention_mask"), cache, images, tokens.shape[0], counts)

    def _placeholders(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if ids is not None:
            return ids == self._config.image_token_id
        # transformers finds placeholders in embeddings the same way
        token = torch.tensor(self._config.image_token_id, device=embeds.device)  # type: ignore[union-attr]
        return (embeds == self._parts.text_model.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]

    def _check_counts(self, placeholders: list[int], images: int, features: list[int] | None) -> None:
        each, total = self._grid.tokens, sum(placeholders)
        if total and not images:
            raise InputError(
                f"the prompt has {total} image tokens but the call carries no image. Pass pixel_values, or remove the "
                "image from the prompt."
            )
        have = images * each if features is None else sum(features)
        if have != total:
            raise InputError(
                f"the prompts have {total} image tokens in all ({placeholders} a sample) but {images} image(s) give "
                f"{have}. Every image needs {each} placeholders; use the model's processor to build the prompt."
            )
        odd = [b for b, n in enumerate(placeholders) if n % each]
        if odd:
            raise InputError(
                f"sample {odd[0]} has {placeholders[odd[0]]} image tokens, which is not a multiple of the {each} "
                "tokens of one image. Do not split a prompt inside an image (prefill_chunk_size must be None)."
            )

    def layout(self, prompt: Prompt, real: Tensor) -> Layout:
        """See `Family.layout`."""
        if prompt.visual is None:
            raise InputError("this call has no image placeholders to lay out.")
        grids = [[self._grid] * (n // self._grid.tokens) for n in prompt.counts]
        return Layout.from_grids(prompt.visual, real, grids)
