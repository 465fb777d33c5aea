"""Images and questions -> the inputs of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["prompt_inputs"]


def prompt_inputs(model: Any, processor: Any, images: list[Image], questions: list[str]) -> dict[str, Any]:
    """A left-padded batch, one image and one question a sample, on the model's device.

    Args:
        model: the model the inputs are for.
        processor: its processor.
        images: RGB images.
        questions: one an image.
    """
    if getattr(processor, "chat_template", None):
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions
        ]
    else:
        token = getattr(processor, "image_token", "<image>")
        texts = [f"{token}\n{question}" for question in questions]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    moved = batch.to(model.device)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
