"""Images, videos and questions -> the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vtprune.videos import Video

__all__ = [
    "Question",
    "chat_text",
    "pictures_seen",
    "plain_media",
    "processor_inputs",
    "prompt_inputs",
    "read_video",
]

# families whose processors take what qwen-vl-utils makes
_QWEN = ("qwen2_vl", "qwen3_vl")


@dataclass(frozen=True)
class Question:
    """One prompt: a question behind its images and videos."""

    text: str
    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()


def prompt_inputs(model: Any, processor: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """A left-padded batch of one question a sample, on the model's device.

    Args:
        model: the model the inputs are for.
        processor: its processor.
        questions: one a sample.

    Raises:
        InputError: if there are videos and the model reads none.
        VtpruneError: if a Qwen model is asked and qwen-vl-utils is not installed.
    """
    if any(q.videos for q in questions) and getattr(processor, "video_processor", None) is None:
        raise InputError(f"{type(model).__name__} reads no videos. Pass images, or a model such as Qwen2-VL.")
    chats = [[{"role": "user", "content": _content(question)}] for question in questions]
    texts = [chat_text(processor, question) for question in questions]
    media = _qwen_media(processor, chats) if _is_qwen(model) else plain_media(questions)
    return dict(processor_inputs(processor, texts, model.device, model.dtype, **media))


def chat_text(processor: Any, question: Question, answer: str | None = None) -> str:
    """A question in the model's own chat format, ready to be answered; with an `answer`, both turns.

    A processor without a chat template gets its image and video tokens, one a line, and the question below them, and
    the answer behind a space.
    """
    if not getattr(processor, "chat_template", None):
        return _plain_text(processor, question) + ("" if answer is None else f" {answer}")
    chat = [{"role": "user", "content": _content(question)}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None)


def processor_inputs(
    processor: Any, texts: Sequence[str], device: torch.device | str, dtype: torch.dtype | None, **media: Any
) -> Any:
    """A left-padded batch of texts with their images and videos, on `device`; pixels in `dtype` (None: as they come).

    Args:
        processor: the model's.
        texts: one a sample, with a placeholder for every picture.
        device: where the inputs go.
        dtype: of the floating-point inputs.
        media: `images`, `videos` and options, in the processor's own words; pictures of all samples in one list.
    """
    batch = processor(text=list(texts), return_tensors="pt", padding=True, padding_side="left", **media)
    return batch.to(device) if dtype is None else batch.to(device, dtype)


def read_video(model: Any, path: Path) -> Video:
    """The frames of a video file that the model shall see: two a second for Qwen models, 8 for others.

    Raises:
        InputError: if the file cannot be read, or is too short.
        VtpruneError: if a package is missing.
    """
    from vtprune.videos import open_video

    if not _is_qwen(model):
        return open_video(path)
    smart_nframes = _qwen_utils().vision_process.smart_nframes

    def count(total: int, fps: float) -> int:
        if total < 2:
            raise InputError(f"{str(path)!r} has {total} frame; {type(model).__name__} needs at least 2.")
        return smart_nframes({}, total, fps)

    return open_video(path, count)


def pictures_seen(processor: Any, inputs: Mapping[str, Any], images: Sequence[Image]) -> list[Image]:
    """What the tower was shown of each image: resized and cropped, where the inputs tell; else the image itself.

    Args:
        processor: the model's.
        inputs: of one sample, what `prompt_inputs` returned.
        images: of the sample, in order.
    """
    import torch
    from PIL import Image as PILImage

    pixels = inputs.get("pixel_values")
    # several crops an image, or rows of patches, do not say how the image lies in them
    if pixels is None or pixels.ndim != 4 or pixels.shape[:2] != (len(images), 3):
        return list(images)
    prepare = processor.image_processor
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (prepare.image_mean, prepare.image_std))
    shown = (pixels.float().cpu() * deviation + mean).clamp(0, 1) * 255
    return [PILImage.fromarray(one.round().byte().permute(1, 2, 0).numpy()) for one in shown]


def _is_qwen(model: Any) -> bool:
    import vtprune

    return vtprune.geometry(model).family in _QWEN


def _qwen_utils() -> Any:
    try:
        import qwen_vl_utils
    except ImportError as error:
        raise VtpruneError(
            f"prompts of Qwen models are made by qwen-vl-utils ({error}). Run: pip install 'vtprune[qwen]'"
        ) from error
    return qwen_vl_utils


def _content(question: Question) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in question.images]
    parts += [{"type": "video", "video": list(v.frames), "sample_fps": v.fps} for v in question.videos]
    return [*parts, {"type": "text", "text": question.text}]


def _plain_text(processor: Any, question: Question) -> str:
    image, video = (getattr(processor, f"{kind}_token", f"<{kind}>") for kind in ("image", "video"))
    marks = [image] * len(question.images) + [video] * len(question.videos)
    return "\n".join([*marks, question.text])


def _qwen_media(processor: Any, chats: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Images and videos as qwen-vl-utils resizes them, within the limits of the processor's own."""
    prepare, films = processor.image_processor, processor.video_processor
    # limits of a frame; those of later models are of a whole video, and there qwen-vl-utils' own hold
    by_frame = type(films).__name__.startswith("Qwen2VL")
    for chat in chats:
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part |= {"min_pixels": prepare.size["shortest_edge"], "max_pixels": prepare.size["longest_edge"]}
            elif part["type"] == "video" and by_frame:
                # qwen-vl-utils gives a frame 128 tokens or more; a processor may be made for fewer
                part["min_pixels"] = min(films.size["shortest_edge"], 128 * (2 * films.patch_size) ** 2)
    images, videos, options = _qwen_utils().process_vision_info(
        chats, image_patch_size=prepare.patch_size, return_video_kwargs=True, return_video_metadata=True
    )
    # sizes are right already, and a second resizing would follow other rules
    media: dict[str, Any] = {"do_resize": False}
    if images:
        media["images"] = images
    if videos:
        frames, metadata = zip(*videos, strict=True)
        media |= {"videos": list(frames), "video_metadata": list(metadata), **options}
    return media


def plain_media(questions: Sequence[Question]) -> dict[str, Any]:
    """Images and videos as processors themselves take them, all frames of a video among its tokens."""
    import numpy as np

    images = [image for question in questions for image in question.images]
    videos = [video for question in questions for video in question.videos]
    media: dict[str, Any] = {"images": images} if images else {}
    if videos:
        media["videos"] = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
        media["do_sample_frames"] = False
        media["video_metadata"] = [
            {"total_num_frames": len(v.frames), "fps": v.fps, "frames_indices": list(range(len(v.frames)))}
            for v in videos
        ]
    return media
