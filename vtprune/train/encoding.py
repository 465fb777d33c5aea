"""Examples -> a batch for the model, with the answer behind the prompt if it is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.images import open_image
from vtprune.prompt import Question, chat_text, processor_inputs

if TYPE_CHECKING:
    from vtprune.train.data import Example

__all__ = ["Encoded", "encode"]


@dataclass(frozen=True)
class Encoded:
    """A left-padded batch.

    Attributes:
        inputs: for `model(**inputs)`; `input_ids` is [B, N].
        answer: [B, N] bool, True at the tokens of the answer and at the one that ends it: the tokens to be predicted,
            each from the logits one position before. They are the last of each row. None if prompts were encoded alone.
    """

    inputs: dict[str, Tensor]
    answer: Tensor | None


def encode(
    processor: Any,
    examples: Sequence[Example],
    device: torch.device | str,
    *,
    answers: bool,
    dtype: torch.dtype | None = None,
) -> Encoded:
    """A batch of examples in the model's own chat format, as `vtprune run` and `vtprune eval` ask them.

    The answer is written as the chat template writes the assistant's turn, up to the token that ends the turn, or the
    tokenizer's end-of-sequence token where the template ends it with none.

    Args:
        processor: of the model.
        examples: one a sample, with as many images each as they like.
        device: where the inputs go.
        answers: whether the answers stand behind the prompts.
        dtype: of pixels; as the processor makes them if None, which every HF model casts for itself or refuses.

    Raises:
        InputError: if there is no example, an image cannot be read, or an answer that is asked for is empty.
    """
    if not examples:
        raise InputError("there is no example to encode; pass at least one.")
    questions = [Question(example.question, _opened(example)) for example in examples]
    texts = [chat_text(processor, question) for question in questions]
    counts: list[int] = []
    if answers:
        tokenizer = getattr(processor, "tokenizer", processor)
        whole = [
            prompt + _turn(processor, tokenizer, question, prompt, example)
            for prompt, question, example in zip(texts, questions, examples, strict=True)
        ]
        counts = [_new_tokens(tokenizer, prompt, text) for prompt, text in zip(texts, whole, strict=True)]
        texts = whole
    images = [image for question in questions for image in question.images]
    inputs = dict(processor_inputs(processor, texts, device, dtype, images=images or None))
    if not answers:
        return Encoded(inputs, None)
    width = inputs["input_ids"].shape[1]
    first = width - torch.tensor(counts, device=device)
    return Encoded(inputs, torch.arange(width, device=device) >= first[:, None])


def _opened(example: Example) -> tuple[Any, ...]:
    return tuple(open_image(image) if isinstance(image, Path) else image for image in example.images)


def _turn(processor: Any, tokenizer: Any, question: Question, prompt: str, example: Example) -> str:
    """What the chat template writes behind the prompt for this answer, to the end of the turn."""
    answer = example.answer.strip()
    if not answer:
        raise InputError(f"the example {example.key!r} has an empty answer, so there is nothing to predict.")
    both = chat_text(processor, question, answer)
    turn = both.removeprefix(prompt)
    if turn == both or answer not in turn:
        # a template that writes past turns in another way than the one it asks for
        turn = answer if prompt[-1:].isspace() else f" {answer}"
    end = turn.index(answer) + len(answer)
    rest = turn[end:]
    gap = len(rest) - len(rest.lstrip())
    marks = [mark for mark in tokenizer.get_added_vocab() if rest.startswith(mark, gap)]
    if marks:
        return turn[:end] + rest[:gap] + max(marks, key=len)
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer {type(tokenizer).__name__} has no token that ends an answer (eos_token).")
    return turn[:end] + tokenizer.eos_token


def _new_tokens(tokenizer: Any, prompt: str, whole: str) -> int:
    """How many tokens `whole` has behind those that it shares with `prompt`."""
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, whole))
    shared = 0
    while shared < len(before) and before[shared] == after[shared]:
        shared += 1
    return len(after) - shared
