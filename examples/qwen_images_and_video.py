"""Ask a Qwen-VL model about images and a video, with all visual tokens and with a part of them.

pip install 'vtprune[qwen]'
python examples/qwen_images_and_video.py --model Qwen/Qwen2.5-VL-3B-Instruct --image a.png --image b.png --video c.mp4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from qwen_vl_utils import process_vision_info
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.videos import open_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--image", action="append", default=[], type=Path)
    parser.add_argument("--video", action="append", default=[], type=Path)
    parser.add_argument("--question", default="What do you see?")
    parser.add_argument("--keep", default="25%")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    asked = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(asked.model)

    content = [{"type": "image", "image": str(path)} for path in asked.image]
    for path in asked.video:
        # 8 frames, read with PyAV; qwen-vl-utils itself needs torchcodec or decord to open a file
        film = open_video(path)
        content.append({"type": "video", "video": list(film.frames), "sample_fps": film.fps})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": asked.question}]}]

    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    # patches have 14 pixels in Qwen2-VL and 16 in Qwen3-VL, and videos carry the times of their frames
    images, videos, options = process_vision_info(
        messages,
        image_patch_size=processor.image_processor.patch_size,
        return_video_kwargs=True,
        return_video_metadata=True,
    )
    films, times = zip(*videos, strict=True) if videos else (None, None)
    inputs = processor(
        text=[text],
        images=images,
        videos=None if films is None else list(films),
        video_metadata=None if times is None else list(times),
        do_resize=False,  # process_vision_info has chosen the sizes
        return_tensors="pt",
        **(options if films else {}),
    ).to(model.device)

    def answer() -> str:
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=asked.max_new_tokens, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("all tokens:", answer())
    with vtprune.prune(model, "fastv", keep=asked.keep) as session:
        print(f"{asked.keep} of them:", answer())
    print(session.report.summary())


if __name__ == "__main__":
    main()
