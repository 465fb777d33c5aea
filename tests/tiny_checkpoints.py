"""Folders with a tiny random model, a tiny tokenizer and the model's real processor, as from_pretrained takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from family_models import CASES, IMAGE, PAD, VIDEO, VOCAB
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

_CHAT = (
    "{% for m in messages %}user {% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% elif part['type'] == 'video' %}VIDEO {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}answer"
)


def tokenizer(specials: dict[int, str]) -> Any:
    """A word is a token; unknown ones are `w3`."""
    names = {PAD: "<pad>", 1: "<s>", 2: "</s>", 4: "user", 5: "answer", 6: "what", 7: "?"} | specials
    words = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w3",
        additional_special_tokens=list(specials.values()),
    )


def save_qwen(folder: Path, name: str = "qwen2_vl") -> Path:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL: 4 pixels a patch, 2 x 2 patches a token, images of 4 to 64 tokens."""
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    videos = "Qwen3VL" if name == "qwen3_vl" else "Qwen2VL"
    specials = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", 96: "<|vision_start|>", 97: "<|vision_end|>"}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    marked = {
        kind: f"<|vision_start|>{pad}<|vision_end|>" for kind, pad in (("IMAGE", specials[99]), ("VIDEO", specials[98]))
    }
    chat = _CHAT
    for mark, text in marked.items():
        chat = chat.replace(mark, text)
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes, min_pixels=4 * 64, max_pixels=64 * 64),
        tokenizer=tokenizer(specials),
        video_processor=getattr(transformers, f"{videos}VideoProcessor")(**sizes),
        chat_template=chat,
    )
    CASES[name].model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llava_next_video(folder: Path) -> Path:
    """A LLaVA-NeXT-Video: 8 pixels a patch, 4 tokens a frame."""
    case = CASES["llava_next_video"]
    tile = {"height": 32, "width": 32}
    pins = case.config().image_grid_pinpoints
    processor = transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(size=tile, crop_size=tile),
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=tile, image_grid_pinpoints=pins
        ),
        tokenizer=tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        chat_template=_CHAT.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    case.model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def film(path: Path, frames: int = 12, fps: int = 12, size: tuple[int, int] = (64, 48)) -> Path:
    """A short MP4 that gets brighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 10 + 200 * i // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def picture(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    """A PNG with a gradient."""
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    return path
