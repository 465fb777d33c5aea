"""The shapes behind the presets: configs of real Hugging Face classes, and random pictures of the size they take.

Numbers are those of the checkpoints' published `config.json`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

__all__ = ["InternVL", "Llama", "Llava", "LlavaNext", "Pictures", "Qwen25VL", "Shape"]

_IMAGE_TOKEN = 3


@dataclass(frozen=True)
class Pictures:
    """Random images of a batch.

    Attributes:
        inputs: what a processor would return for them.
        tokens: visual tokens an image.
    """

    inputs: dict[str, Any]
    tokens: int


@dataclass(frozen=True)
class Llama:
    """A decoder: hidden and intermediate width, layers, heads, key heads, vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def arguments(self, layers: int | None, **more: Any) -> dict[str, Any]:
        """For a text config of `transformers`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **more,
        }


@dataclass(frozen=True)
class Shape(ABC):
    """A model.

    Attributes:
        summary: one line for listings.
        decoder: its decoder.
        hidden, intermediate, blocks, heads: its vision tower.
        image, patch: pixels of a side.
    """

    model_class: ClassVar[str]

    summary: str
    decoder: Llama
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    image: int
    patch: int

    @abstractmethod
    def config(self, layers: int | None) -> Any:
        """The HF config, with `layers` decoder layers if given."""

    @abstractmethod
    def pictures(self, count: int, generator: torch.Generator) -> Pictures:
        """`count` random images."""

    def _clip(self) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            image_size=self.image,
            patch_size=self.patch,
            projection_dim=self.hidden,
        )

    def _noise(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        import torch

        return torch.randn(*shape, generator=generator)


@dataclass(frozen=True)
class Llava(Shape):
    """CLIP tower and Llama decoder; (image / patch) ** 2 visual tokens an image."""

    model_class: ClassVar[str] = "LlavaForConditionalGeneration"

    def config(self, layers: int | None) -> Any:
        """See `Shape.config`."""
        from transformers import LlamaConfig, LlavaConfig

        return LlavaConfig(
            vision_config=self._clip(),
            text_config=LlamaConfig(**self.decoder.arguments(layers)),
            image_token_index=_IMAGE_TOKEN,
            image_seq_length=(self.image // self.patch) ** 2,
        )

    def pictures(self, count: int, generator: torch.Generator) -> Pictures:
        """See `Shape.pictures`."""
        pixels = self._noise(count, 3, self.image, self.image, generator=generator)
        return Pictures({"pixel_values": pixels}, (self.image // self.patch) ** 2)


@dataclass(frozen=True)
class LlavaNext(Llava):
    """An image of two by two crops and the whole in small: five times the tokens, and a newline token a row."""

    model_class: ClassVar[str] = "LlavaNextForConditionalGeneration"

    def config(self, layers: int | None) -> Any:
        """See `Shape.config`."""
        from transformers import LlamaConfig, LlavaNextConfig

        n = self.image
        return LlavaNextConfig(
            vision_config=self._clip(),
            text_config=LlamaConfig(**self.decoder.arguments(layers)),
            image_token_index=_IMAGE_TOKEN,
            image_grid_pinpoints=[[n, 2 * n], [2 * n, n], [2 * n, 2 * n], [3 * n, n], [n, 3 * n]],
        )

    def pictures(self, count: int, generator: torch.Generator) -> Pictures:
        """See `Shape.pictures`."""
        import torch

        side = self.image // self.patch
        pixels = self._noise(count, 5, 3, self.image, self.image, generator=generator)
        sizes = torch.tensor([[2 * self.image, 2 * self.image]] * count)
        return Pictures({"pixel_values": pixels, "image_sizes": sizes}, side**2 + 2 * side * (2 * side + 1))


@dataclass(frozen=True)
class Qwen25VL(Shape):
    """Windows in the tower, two by two patches a token, M-RoPE, tied embeddings where the checkpoint has them."""

    model_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"

    window: int = 112
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    sections: tuple[int, int, int] = (16, 24, 24)

    def config(self, layers: int | None) -> Any:
        """See `Shape.config`."""
        from transformers import Qwen2_5_VLConfig

        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(self.sections)}
        return Qwen2_5_VLConfig(
            vision_config={
                "depth": self.blocks,
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_heads": self.heads,
                "patch_size": self.patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": self.window,
                "fullatt_block_indexes": list(self.full_blocks),
                "out_hidden_size": self.decoder.hidden,
            },
            text_config=self.decoder.arguments(layers, rope_parameters=rope),
            image_token_id=_IMAGE_TOKEN,
            video_token_id=_IMAGE_TOKEN + 1,
            vision_start_token_id=_IMAGE_TOKEN + 2,
            vision_end_token_id=_IMAGE_TOKEN + 3,
        )

    def pictures(self, count: int, generator: torch.Generator) -> Pictures:
        """See `Shape.pictures`."""
        import torch

        side = self.image // self.patch
        pixels = self._noise(count * side**2, 3 * 2 * self.patch**2, generator=generator)
        return Pictures(
            {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * count)}, side**2 // 4
        )


@dataclass(frozen=True)
class InternVL(Shape):
    """InternViT tower and Qwen2 decoder; a tile of (image / patch) ** 2 patches is a quarter as many tokens."""

    model_class: ClassVar[str] = "InternVLForConditionalGeneration"

    tiles: int = 1

    def config(self, layers: int | None) -> Any:
        """See `Shape.config`."""
        from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

        vision = InternVLVisionConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            image_size=[self.image, self.image],
            patch_size=[self.patch, self.patch],
        )
        return InternVLConfig(
            vision_config=vision.to_dict(),
            text_config=Qwen2Config(**self.decoder.arguments(layers)).to_dict(),
            image_token_id=_IMAGE_TOKEN,
            image_seq_length=(self.image // self.patch) ** 2 // 4,
        )

    def pictures(self, count: int, generator: torch.Generator) -> Pictures:
        """See `Shape.pictures`."""
        pixels = self._noise(count * self.tiles, 3, self.image, self.image, generator=generator)
        return Pictures({"pixel_values": pixels}, self.tiles * (self.image // self.patch) ** 2 // 4)
