"""LLaVA, Qwen2-VL, Qwen2.5-VL and InternVL on vLLM's Transformers backend, with B of N tokens of each image.

The worker runs the Hugging Face tower with the same hooks as `vtprune.prune` and hands B embeddings on; the front end
(`vtprune.integrations.vllm.front`) has laid B placeholders into the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import PlaceholderRange  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.vllm.front import FULL, VTPruneInfo, VTPruneProcessor
from vtprune.integrations.vllm.images import ImagePruner
from vtprune.integrations.vllm.rope import Span, fill_positions, restored_prompt, with_cells, without_cells
from vtprune.integrations.vllm.settings import KEEP, QUESTION, Settings, parts_of

__all__ = ["MixedIn", "PrunedImages", "VTPruneModel", "let_positions_through"]


# a mixin calls what the classes behind it bring, which no type checker sees
MixedIn: Any = object


class PrunedImages(MixedIn):
    """Goes before a multimodal class of the Transformers backend: what it encodes is pruned."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        for option in ("compile_mm_encoder", "cudagraph_mm_encoder"):
            if getattr(vllm_config.compilation_config, option):
                raise UnsupportedModelError(f"vtprune reads the vision tower by hooks: leave {option} off.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = Settings.read(getattr(self.config, "vtprune", None))
        several = get_tensor_model_parallel_world_size() > 1
        self.pruner = ImagePruner(self.model, settings, _all_heads if several else None)
        self._mrope = bool(vllm_config.model_config.uses_mrope)
        if self._mrope:
            let_positions_through(vllm_config.model_config.multimodal_config)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """[B, D] of each image; under M-RoPE its cells in further channels (`vtprune.integrations.vllm.rope`)."""
        kept = [int(n) for n in kwargs.pop(KEEP)]
        full = [int(n) for n in kwargs.pop(FULL)]
        parts = [parts_of(self.pruner.geometry, n) for n in full]
        asked = kwargs.pop(QUESTION, None)
        with self.pruner.encoding(kwargs, kept, parts):
            features = super().embed_multimodal(**kwargs)
        words = None if asked is None else [self.words(ids.to(features[0].device)) for ids in asked]
        pruned = self.pruner.finish(features, kept, words)
        if not self._mrope:
            return [rows for rows, _ in pruned]
        columns = self.pruner.grid_columns()
        return [with_cells(rows, index, n) for (rows, index), n in zip(pruned, columns, strict=True)]

    def words(self, ids: Tensor) -> Tensor:
        """[t] ids of a question -> [t, D] embeddings of the decoder."""
        return self.embed_input_ids(ids)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """[3, T] positions, right at text and provisional at images, and what decoding adds to a token's index."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        spans = [Span(f.mm_position.offset, f.mm_position.length, int(f.data[FULL].data)) for f in features if f.data]
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


@MULTIMODAL_REGISTRY.register_processor(VTPruneProcessor, info=VTPruneInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class VTPruneModel(PrunedImages, TransformersMultiModalForCausalLM, SupportsMultiModalPruning):
    """The model in the worker, tower and decoder on the Transformers backend."""


def _all_heads(states: Tensor) -> Tensor:
    """[B, H, M, d] of the heads of this rank -> of all of them."""
    return tensor_model_parallel_all_gather(states.contiguous(), dim=1)


def let_positions_through(multimodal: Any) -> None:
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
