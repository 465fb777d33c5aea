"""LLaVA, Qwen2-VL, Qwen2.5-VL and InternVL on vLLM's Transformers backend, with B of N tokens of each image.

The front end lays B placeholders for an image into the prompt, so that KV cache, prefix cache and scheduler see B. The
worker runs the Hugging Face tower with the same hooks as `vtprune.prune` and hands B embeddings on.

This file and those beside it that it imports are loaded by vLLM only; see `vtprune.integrations.vllm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models.interfaces import (  # pyright: ignore[reportMissingImports]
    SupportsMultiModalPruning,
    supports_multimodal_pruning,
)
from vllm.model_executor.models.transformers import (  # pyright: ignore[reportMissingImports]
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import (  # pyright: ignore[reportMissingImports]
    MultiModalFieldConfig,
    PlaceholderRange,
)
from vllm.multimodal.parse import ImageProcessorItems  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from vtprune.errors import InputError, UnsupportedModelError
from vtprune.integrations.vllm.images import ImagePruner, checked_geometry
from vtprune.integrations.vllm.rope import Span, fill_positions, restored_prompt, with_cells, without_cells
from vtprune.integrations.vllm.settings import KEEP, Settings, kept_of_image, parts_of, read_keep

__all__ = ["VTPruneInfo", "VTPruneModel", "VTPruneProcessor"]

_FULL = "vtprune_full"
"""Field of an image that travels to the worker beside `KEEP` (B): its N."""


class VTPruneInfo(MultiModalProcessingInfo):
    """What the front end knows of the model."""

    @cached_property
    def vtprune(self) -> Settings:
        """The engine's settings."""
        return Settings.read(getattr(self.get_hf_config(), "vtprune", None))

    @cached_property
    def geometry(self) -> Any:
        """The model's shape; raises if the plugin cannot serve it."""
        return checked_geometry(self.get_hf_config(), self.vtprune)

    @property
    def model_id(self) -> str:
        """Part of the hash of every image: features kept under other settings are other features."""
        return f"{super().model_id}#vtprune={self.vtprune.key}"

    def _get_supported_modalities(self) -> list[str]:
        return ["image"]

    def kept(self, keep: Any, tokens: int) -> int:
        """B for an image of `tokens` tokens; `keep` is the request's, None if it gave none."""
        budget = self.vtprune.keep if keep is None else read_keep(keep)
        return kept_of_image(self.vtprune.scorer, self.geometry, budget, tokens)


class VTPruneProcessor(MultiModalProcessor):
    """Lays B placeholders of an image into the prompt where the Hugging Face processor asks for N."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        if "image" in mm_items and not isinstance(mm_items["image"], ImageProcessorItems):
            raise InputError("vtprune chooses tokens in the vision tower: pass images, not image embeddings.")
        keep = hf_kwargs.get(KEEP)
        if keep is not None:
            read_keep(keep)
        output = super()._apply_hf_processor_main(mm_items, _without_ours(hf_kwargs))
        ids = output.get("image_replacement_ids")
        if ids is None:
            return output
        shorter, sizes, kept, full = [], [], [], []
        for expansion in ids.split(output["image_replacement_sizes"].tolist()):
            visual = expansion == expansion.mode().values
            tokens = int(visual.sum())
            stay = self.info.kept(keep, tokens)
            # what frames the placeholders stays
            expansion = expansion[~visual | (visual.cumsum(0) <= stay)]
            shorter.append(expansion)
            sizes.append(len(expansion))
            kept.append(stay)
            full.append(tokens)
        output["image_replacement_ids"], output["image_replacement_sizes"] = torch.cat(shorter), torch.tensor(sizes)
        output[KEEP], output[_FULL] = torch.tensor(kept), torch.tensor(full)
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        # the base class would cut ours like pixels
        ours = {name: hf_inputs.pop(name) for name in (KEEP, _FULL) if name in hf_inputs}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        hf_inputs.update(ours)
        return fields | {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        return super()._get_prompt_updates(mm_items, _without_ours(hf_processor_mm_kwargs), out_mm_kwargs)


def _without_ours(arguments: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name != KEEP}


@MULTIMODAL_REGISTRY.register_processor(VTPruneProcessor, info=VTPruneInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class VTPruneModel(TransformersMultiModalForCausalLM, SupportsMultiModalPruning):
    """The model in the worker."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.compilation_config.compile_mm_encoder:
            raise UnsupportedModelError("vtprune reads the vision tower by hooks: leave compile_mm_encoder off.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = Settings.read(getattr(self.config, "vtprune", None))
        several = get_tensor_model_parallel_world_size() > 1
        self.pruner = ImagePruner(self.model, settings, _all_heads if several else None)
        self._mrope = bool(vllm_config.model_config.uses_mrope)
        if self._mrope:
            _let_positions_through(vllm_config.model_config.multimodal_config)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """[B, D] of each image; under M-RoPE its cells in further channels (`vtprune.integrations.vllm.rope`)."""
        kept = [int(n) for n in kwargs.pop(KEEP)]
        full = [int(n) for n in kwargs.pop(_FULL)]
        parts = [parts_of(self.pruner.geometry, n) for n in full]
        with self.pruner.encoding(kwargs, kept, parts):
            features = super().embed_multimodal(**kwargs)
        pruned = self.pruner.finish(features, kept)
        if not self._mrope:
            return [rows for rows, _ in pruned]
        columns = self.pruner.grid_columns()
        return [with_cells(rows, index, n) for (rows, index), n in zip(pruned, columns, strict=True)]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """[3, T] positions, right at text and provisional at images, and what decoding adds to a token's index."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        spans = [Span(f.mm_position.offset, f.mm_position.length, int(f.data[_FULL].data)) for f in features if f.data]
        whole, there, moved = restored_prompt(input_tokens, spans)
        restored = [
            dataclasses.replace(f, mm_position=PlaceholderRange(offset=span.start, length=span.length))
            for f, span in zip(features, moved, strict=True)
        ]
        positions, delta = super().get_mrope_input_positions(whole, restored)
        return positions[:, torch.tensor(there)], delta + len(whole) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Called by vLLM before a chunk runs: the images' embeddings, all positions, and the delta of decoding."""
        positions, rows = mrope_positions, []
        if len(multimodal_embeddings):
            taken = [without_cells(part) for part in multimodal_embeddings]
            rows = [part for part, _ in taken]
            visual = torch.as_tensor(input_ids, device=positions.device) == self.config.image_token_id
            positions = fill_positions(positions, visual, num_computed_tokens, torch.cat([c for _, c in taken], 1))
        return rows, positions, int(positions.max()) + 1 - positions.shape[1]


def _all_heads(states: Tensor) -> Tensor:
    """[B, H, M, d] of the heads of this rank -> of all of them."""
    return tensor_model_parallel_all_gather(states.contiguous(), dim=1)


def _let_positions_through(multimodal: Any) -> None:
    """Have the runner ask for the positions of images: it does so where video pruning is on.

    A rate this small drops no video token, and videos are refused anyway.
    """
    if not multimodal.is_multimodal_pruning_enabled():
        multimodal.video_pruning_rate = 1e-18
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # pyright: ignore[reportMissingImports]

        # the other runners set it when they load a model; this one's own way of loading leaves it out
        CPUModelRunner.is_multimodal_pruning_enabled = property(_positions_wanted, _ignore)


def _positions_wanted(runner: Any) -> bool:
    multimodal = runner.model_config.multimodal_config
    loaded = getattr(runner, "model", None)
    return loaded is not None and supports_multimodal_pruning(loaded) and multimodal.is_multimodal_pruning_enabled()


def _ignore(runner: Any, value: bool) -> None:
    """The rule of `_positions_wanted` holds whatever the runner sets."""
