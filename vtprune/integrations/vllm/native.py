"""vLLM's own classes of LLaVA-1.5, Qwen2-VL, Qwen2.5-VL and InternVL, with B of N tokens of each image.

The decoder, its weights, LoRA and pipeline stages are vLLM's own. The vision side is that of
`vtprune.integrations.vllm.generic`, because scorers read its attention and cut inside it, which the fused blocks of
vLLM's own towers do not let anybody do; those are never built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.interfaces import (  # pyright: ignore[reportMissingImports]
    SupportsMultiModalPruning,
)
from vllm.model_executor.models.interns1 import (  # pyright: ignore[reportMissingImports]
    InternS1ForConditionalGeneration,
)
from vllm.model_executor.models.llava import LlavaForConditionalGeneration  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.qwen2_5_vl import (  # pyright: ignore[reportMissingImports]
    Qwen2_5_VLForConditionalGeneration,
)
from vllm.model_executor.models.qwen2_vl import (  # pyright: ignore[reportMissingImports]
    Qwen2VLForConditionalGeneration,
)
from vllm.model_executor.models.transformers import (  # pyright: ignore[reportMissingImports]
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
)
from vllm.model_executor.models.utils import (  # pyright: ignore[reportMissingImports]
    StageMissingLayer,
    maybe_prefix,
    no_init_weights,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]

from vtprune.integrations.vllm.front import VTPruneInfo, VTPruneProcessor
from vtprune.integrations.vllm.generic import MixedIn, PrunedImages

__all__ = ["VTPruneInternVL", "VTPruneLlava", "VTPruneQwen2VL", "VTPruneQwen25VL", "VisionSide"]

_VISION = ("vision_tower.", "multi_modal_projector.", "visual.")
"""What weights of the vision side are called in checkpoints, behind "model." in the newer ones."""


class VisionSide(PrunedImages, MultiModalMixin):
    """Tower and projector of a model on vLLM's Transformers backend, without its decoder."""

    def _decorate_for_torch_compile(self) -> None:
        """The decoder, which is what would be compiled, is another class."""

    @contextlib.contextmanager
    def _mark_model_components(self, vllm_config: Any) -> Iterator[None]:
        """The class that holds this one marks its own."""
        yield

    def pipeline_parallel(self) -> None:
        """Called once the modules are there and before they get memory: the decoder's leave."""
        text = self.model.language_model
        text.layers, text.embed_tokens, text.norm = nn.ModuleList(), nn.Identity(), nn.Identity()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """None: those that need a KV cache are the decoder's."""


class _Native(MixedIn):
    """Goes before one of vLLM's own multimodal classes: images are encoded by a `VisionSide`."""

    # the vision side is not vLLM's own
    supports_encoder_tp_data = False
    supports_mm_device_do_normalize = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vision_side = VisionSide(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "vision_side"))
        self.vision_side.words = self.get_language_model().embed_input_ids

    @contextlib.contextmanager
    def _mark_tower_model(self, vllm_config: Any, modalities: Any, *, targets: Any = None) -> Iterator[None]:
        """Everything built in this context is left out, as vLLM does where no image may be asked."""
        with no_init_weights(self, lambda module: StageMissingLayer("vision_tower", module), targets=targets):
            yield

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """See `PrunedImages`."""
        return self.vision_side.embed_multimodal(**kwargs)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """See `PrunedImages`."""
        return self.vision_side.get_mrope_input_positions(input_tokens, mm_features)

    def recompute_mrope_positions(self, *args: Any, **kwargs: Any) -> tuple[Sequence[Tensor], Tensor, int]:
        """See `PrunedImages`."""
        return self.vision_side.recompute_mrope_positions(*args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the decoder as vLLM does and the vision side as its Transformers backend does; what was loaded."""
        vision: list[tuple[str, Tensor]] = []

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.removeprefix("model.").startswith(_VISION):
                    vision.append((name, weight))
                else:
                    yield name, weight

        loaded = super().load_weights(others())
        return loaded | {f"vision_side.{name}" for name in self.vision_side.load_weights(vision)}


_registered = MULTIMODAL_REGISTRY.register_processor(
    VTPruneProcessor, info=VTPruneInfo, dummy_inputs=MultiModalDummyInputsBuilder
)


@_registered
class VTPruneLlava(_Native, LlavaForConditionalGeneration, SupportsMultiModalPruning):
    """LLaVA-1.5, with a CLIP or SigLIP tower."""


@_registered
class VTPruneQwen2VL(_Native, Qwen2VLForConditionalGeneration, SupportsMultiModalPruning):
    """Qwen2-VL."""


@_registered
class VTPruneQwen25VL(_Native, Qwen2_5_VLForConditionalGeneration, SupportsMultiModalPruning):
    """Qwen2.5-VL."""


@_registered
class VTPruneInternVL(_Native, InternS1ForConditionalGeneration, SupportsMultiModalPruning):
    """InternVL in its Hugging Face format, which vLLM serves by this class of its own."""
