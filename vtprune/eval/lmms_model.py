"""The lmms-eval model `vtprune`: any supported Hugging Face VLM, pruned by any method, in batches.

Both classes read the same model arguments (`pretrained=tiny:llava,method=fastv,keep=0.25`); the chat class formats
prompts from messages, the simple class from a context and a list of images.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.protocol import ChatMessages

from vtprune.errors import InputError
from vtprune.eval.lmms_base import LmmsVtprune, Prompt, Request

__all__ = ["VtpruneChat", "VtpruneSimple"]


class VtpruneChat(LmmsVtprune):
    """Chat slot: request arguments are (context, doc_to_messages, settings, doc id, task, split)."""

    is_simple = False

    def _parts(self, arguments: tuple[Any, ...]) -> Request:
        _, doc_to_messages, settings, doc_id, task, split = arguments

        def make() -> Prompt:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            images, videos, audios = messages.extract_media()
            if videos or audios:
                raise InputError(f"task {task!r} asks about video or audio; the model 'vtprune' takes images and text.")
            return self.prompt(messages.to_hf_messages()), images

        return Request(make, settings, task, int(doc_id))


class VtpruneSimple(LmmsVtprune):
    """Simple slot: request arguments are (context, settings, doc_to_visual, doc id, task, split)."""

    is_simple = True

    def _parts(self, arguments: tuple[Any, ...]) -> Request:
        context, settings, doc_to_visual, doc_id, task, split = arguments

        def make() -> Prompt:
            images = list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
            text = context.replace("<image>", "").strip()
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
            return self.prompt([{"role": "user", "content": content}]), images

        return Request(make, settings, task, int(doc_id))
