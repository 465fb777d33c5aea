"""The lmms-eval model `vtprune`: any supported Hugging Face VLM, pruned by any method, in batches.

Both classes read the same model arguments (`pretrained=tiny:llava,method=fastv,keep=0.25`); the chat class formats
prompts from messages, the simple class from a context and a list of images or videos.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.protocol import ChatMessages

from vtprune.errors import InputError
from vtprune.eval.asking import Prompt, Request, read_medium
from vtprune.eval.lmms_base import LmmsVtprune
from vtprune.videos import Video

__all__ = ["VtpruneChat", "VtpruneSimple"]


class VtpruneChat(LmmsVtprune):
    """Chat slot: request arguments are (context, doc_to_messages, settings, doc id, task, split)."""

    is_simple = False

    def _parts(self, arguments: tuple[Any, ...]) -> Request:
        _, doc_to_messages, settings, doc_id, task, split = arguments

        def make() -> Prompt:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            return self.read(messages, task)

        return Request(make, settings, task, int(doc_id))

    def read(self, messages: ChatMessages, task: str) -> Prompt:
        """Messages as a prompt: text in the model's chat format, images and videos in order.

        Raises:
            InputError: if there is audio, or a video that the model cannot read.
        """
        images, videos, audios = messages.extract_media()
        if audios:
            raise InputError(f"task {task!r} asks about audio; the model 'vtprune' takes images, videos and text.")
        films = [read_medium(self.model, self.processor, video) for video in videos]
        return self.prompt(messages.to_hf_messages()), [*images, *films]


class VtpruneSimple(LmmsVtprune):
    """Simple slot: request arguments are (context, settings, doc_to_visual, doc id, task, split)."""

    is_simple = True

    def _parts(self, arguments: tuple[Any, ...]) -> Request:
        context, settings, doc_to_visual, doc_id, task, split = arguments

        def make() -> Prompt:
            shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            media = [read_medium(self.model, self.processor, medium) for medium in shown]
            text = context.replace("<image>", "").strip()
            content = [{"type": "video" if isinstance(medium, Video) else "image"} for medium in media]
            return self.prompt([{"role": "user", "content": [*content, {"type": "text", "text": text}]}]), media

        return Request(make, settings, task, int(doc_id))
