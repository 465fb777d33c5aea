"""Finds GemFilter's filter layer on a handful of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import vtprune
from vtprune.errors import InputError

__all__ = ["LayerRow", "calibrate_gemfilter", "candidate_layers", "choose_layer"]


@dataclass(frozen=True)
class LayerRow:
    """How well the model still gives its own answers when this layer filters.

    Attributes:
        layer: GemFilter's r.
        log_probs: for each sample the mean natural log-probability of the tokens of the unpruned model's answer.
        same: for each sample whether the pruned model gives exactly that answer.
        flops, flops_full: decoder prefill of all samples, first pass included, as run and unpruned.
    """

    layer: int
    log_probs: tuple[float, ...]
    same: tuple[bool, ...]
    flops: int
    flops_full: int

    @property
    def log_prob(self) -> float:
        """Mean over the samples."""
        return sum(self.log_probs) / len(self.log_probs)

    @property
    def same_share(self) -> float:
        """Share of the samples whose answer stays exactly the same."""
        return sum(self.same) / len(self.same)

    @property
    def flops_share(self) -> float:
        """Share of the unpruned decoder prefill."""
        return self.flops / self.flops_full


def candidate_layers(layers: int) -> list[int]:
    """The layers that are tried unless others are named: from 0 to two thirds of the depth, 0 to 8 of 12.

    Args:
        layers: decoder layers of the model.
    """
    return list(range(2 * layers // 3 + 1))


def calibrate_gemfilter(
    model: Any,
    prompts: Sequence[dict[str, Any]],
    keep: int | float | str,
    layers: Sequence[int],
    *,
    max_new_tokens: int = 32,
    tell: Callable[[], object] | None = None,
) -> list[LayerRow]:
    """How likely the unpruned model's own answers stay under `GemFilter(layer=r)`, for each r.

    The model answers each prompt greedily, unpruned. Then, for each layer, the prompt is pruned (basis "final", so that
    every layer leaves equally many tokens) and the answer is forced token by token in `generate`: the scorer sees the
    prompt alone, and every token is predicted over the cache that pruning left, as in a real answer.

    Args:
        model: a model that `vtprune.prune` takes, in eval mode, not pruned.
        prompts: inputs of `model.generate`, one sample each ([1, N] ids), on the model's device.
        keep: budget, see `vtprune.prune`.
        layers: filter layers to try; sorted, repeated ones count once.
        max_new_tokens: longest answer.
        tell: called after every answer, `len(prompts) * (1 + layers)` times.

    Returns:
        one row a layer, by increasing layer.

    Raises:
        InputError: if there is no prompt or no layer, a prompt is a batch, or a layer is not one of the decoder.
        BudgetError: if the budget is malformed.
    """
    depth = vtprune.geometry(model).layers
    if not prompts or not layers:
        raise InputError(f"calibration needs a prompt and a layer, got {len(prompts)} and {len(layers)}.")
    if outside := sorted(layer for layer in set(layers) if not 0 <= layer < depth):
        raise InputError(f"layers must be in [0, {depth - 1}] ({depth} decoder layers), got {outside}.")
    if wide := [len(prompt["input_ids"]) for prompt in prompts if len(prompt["input_ids"]) != 1]:
        raise InputError(f"every prompt must be one sample, got a batch of {wide[0]}.")
    tell = tell or (lambda: None)
    answers = []
    for prompt in prompts:
        answers.append(_generate(model, prompt, max_new_tokens=max_new_tokens).sequences[0, _width(prompt) :])
        tell()
    gemfilter: Any = vtprune.GemFilter  # type: ignore[attr-defined]
    rows = []
    for layer in sorted(set(layers)):
        log_probs, same, flops, flops_full = [], [], 0, 0
        with vtprune.prune(model, gemfilter(layer=layer), keep, basis="final") as session:
            for prompt, answer in zip(prompts, answers, strict=True):
                log_prob, equal = _forced(model, prompt, answer)
                log_probs.append(log_prob)
                same.append(equal)
                flops, flops_full = flops + session.report.flops, flops_full + session.report.flops_full
                tell()
        rows.append(LayerRow(layer, tuple(log_probs), tuple(same), flops, flops_full))
    return rows


def choose_layer(rows: Sequence[LayerRow]) -> int:
    """The first layer whose mean log-probability is within one standard error of the best layer's.

    The standard error is that of the mean difference to the best layer, paired over the samples: s / sqrt(n), s with
    n - 1. Where only one sample differs it equals the difference, and the layer counts as within.

    Raises:
        InputError: if there is no row, or fewer than two samples.
    """
    if not rows or len(rows[0].log_probs) < 2:
        raise InputError("a layer is chosen from at least one row of at least two samples.")
    best = max(rows, key=lambda row: row.log_prob)

    def within(row: LayerRow) -> bool:
        lost = [a - b for a, b in zip(best.log_probs, row.log_probs, strict=True)]
        mean = sum(lost) / len(lost)
        error = math.sqrt(sum((x - mean) ** 2 for x in lost) / (len(lost) - 1) / len(lost))
        # not decided by how the last bit was rounded
        return mean <= error * (1 + 1e-9)

    return min(row.layer for row in rows if within(row))


class _Force(LogitsProcessor):
    """Makes `generate` write a given answer, and notes whether it would have done so by itself."""

    def __init__(self, answer: Tensor) -> None:
        self.answer, self.step, self.same = answer, 0, True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = int(self.answer[self.step])
        self.step += 1
        self.same &= int(scores[0].argmax()) == token
        forced = torch.full_like(scores, float("-inf"))
        forced[0, token] = 0.0
        return forced


def _width(prompt: dict[str, Any]) -> int:
    return prompt["input_ids"].shape[1]


def _generate(model: Any, prompt: dict[str, Any], **options: Any) -> Any:
    # None silences the warning about sampling settings that a checkpoint carries along
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return model.generate(**prompt, **greedy, return_dict_in_generate=True, **options)


def _forced(model: Any, prompt: dict[str, Any], answer: Tensor) -> tuple[float, bool]:
    """Mean log-probability of `answer` [T], and whether greedy decoding gives it too."""
    force = _Force(answer)
    # own processors run behind those of the checkpoint, so what they see is what greedy decoding takes the largest of;
    # logits are fp32 whatever the model's dtype
    out = _generate(
        model, prompt, max_new_tokens=len(answer), logits_processor=LogitsProcessorList([force]), output_logits=True
    )
    log_probs = torch.stack([step[0] for step in out.logits]).log_softmax(-1)
    return log_probs.gather(1, answer[:, None].to(log_probs.device)).mean().item(), force.same
