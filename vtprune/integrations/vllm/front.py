"""The plugin's front end: B of the N placeholders of an image go into the prompt.

KV cache, prefix cache and scheduler see B. The worker's classes stand in `generic` and `native`.

This file and those two are loaded by vLLM only; see `vtprune.integrations.vllm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.models.transformers import (  # pyright: ignore[reportMissingImports]
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]
from vllm.multimodal.parse import ImageProcessorItems  # pyright: ignore[reportMissingImports]

from vtprune.errors import InputError
from vtprune.integrations.vllm.images import checked_geometry
from vtprune.integrations.vllm.settings import KEEP, QUESTION, Settings, kept_of_image, read_keep

__all__ = ["FULL", "VTPruneInfo", "VTPruneProcessor"]

FULL = "vtprune_full"
"""Field of an image that travels to the worker beside `KEEP` (B) and `QUESTION` (its token ids): its N."""


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

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM measures its memory with; asks nothing."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.info.vtprune.scorer.reads_text:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, QUESTION: ""}
        return inputs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        if "image" in mm_items and not isinstance(mm_items["image"], ImageProcessorItems):
            raise InputError("vtprune chooses tokens in the vision tower: pass images, not image embeddings.")
        keep = hf_kwargs.get(KEEP)
        if keep is not None:
            read_keep(keep)
        question = self.info.vtprune.question(hf_kwargs.get(QUESTION)) if "image" in mm_items else None
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
        output[KEEP], output[FULL] = torch.tensor(kept), torch.tensor(full)
        if question is not None:
            words = self.info.get_tokenizer().encode(question, add_special_tokens=False)
            output[QUESTION] = torch.tensor(words, dtype=torch.long).expand(len(kept), -1)
        return output

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        # the base class would cut ours like pixels
        ours = {name: hf_inputs.pop(name) for name in (KEEP, FULL, QUESTION) if name in hf_inputs}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        hf_inputs.update(ours)
        return fields | {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        return super()._get_prompt_updates(mm_items, _without_ours(hf_processor_mm_kwargs), out_mm_kwargs)


def _without_ours(arguments: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name not in (KEEP, QUESTION)}
