"""Report: what the last call kept and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.layout import Layout
from vtprune.plan import Site

__all__ = ["Kept", "Report"]


@dataclass(frozen=True)
class Kept:
    """What one stage kept.

    Attributes:
        site: the stage's site; `str()` reads `vision[3]`, `input`, `restart[5]`, `layer[2]`.
        indices: for each sample a LongTensor into its visual tokens in sequence order, increasing.
        scores: for each sample an fp32 tensor beside `alive`, the tokens scored (in order), or None.
        alive: for each sample the indices that were scored, or None.
        text: for each sample a LongTensor into its tokens that are neither visual nor padding, increasing: those that
            are left; None if the stage drops no text.
        merged: for each sample a LongTensor [2, n], the tokens that left into another one and the survivors that they
            went into; None if the stage merges nothing.
    """

    site: Site
    indices: tuple[Tensor, ...]
    scores: tuple[Tensor, ...] | None = None
    alive: tuple[Tensor, ...] | None = None
    text: tuple[Tensor, ...] | None = None
    merged: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Report:
    """What one prefill kept and cost. FLOPs are 2 x multiply-accumulates of the batch as run, padding included.

    Attributes:
        visual_tokens: visual tokens of each sample.
        text_tokens: real tokens of each sample that are not visual.
        tokens_per_layer: for each sample, visual tokens that enter each decoder layer.
        text_kept: those of `text_tokens` that the decoder's layers run on; fewer only where a stage drops text.
        restarted: for each sample, visual tokens that entered a decoder layer in a pass that a `restart[k]` broke off,
            summed over the layers; () if there was none.
        asked: (k, rows) of what ran only to be asked, in order: a restart's first pass, k layers in full and the
            queries, keys and values of layer k; with k = 0 those of one layer that looks ahead. Rows of a sample, with
            its padding.
        kept: one record a stage, in order.
        flops, flops_full: decoder prefill without the output head, as run and unpruned.
        vision_flops, vision_flops_full: tower and projector; 0 if they did not run in this call.
        kv_bytes, kv_bytes_full: keys and values after the prefill.
        layout: which pixels each visual token covers; not part of `to_dict()`.
        notes: what is assumed about the model.
    """

    visual_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    tokens_per_layer: tuple[tuple[int, ...], ...]
    text_kept: tuple[int, ...]
    kept: tuple[Kept, ...]
    flops: int
    flops_full: int
    vision_flops: int
    vision_flops_full: int
    kv_bytes: int
    kv_bytes_full: int
    layout: Layout | None = None
    notes: tuple[str, ...] = ()
    restarted: tuple[int, ...] = ()
    asked: tuple[tuple[int, int], ...] = ()

    @property
    def average_tokens(self) -> tuple[float, ...]:
        """Visual tokens that enter a decoder layer, averaged over the layers, for each sample; `restarted` included."""
        extra = self.restarted or (0,) * len(self.tokens_per_layer)
        return tuple((sum(row) + more) / len(row) for row, more in zip(self.tokens_per_layer, extra, strict=True))

    def owners(self, sample: int = 0, stage: int = -1) -> Tensor:
        """Who stands for each visual token of a sample: [V] int64, its own index if it is left, -1 if it was dropped.

        How many tokens a survivor stands for is how often it occurs.

        Args:
            sample: which one.
            stage: after which record of `kept`; the last one unless given.

        Raises:
            InputError: if there is no such sample or stage.
        """
        if not 0 <= sample < len(self.visual_tokens):
            raise InputError(f"the last call had {len(self.visual_tokens)} sample(s), got sample={sample}.")
        if self.kept and not -len(self.kept) <= stage < len(self.kept):
            raise InputError(f"stage must be one of the {len(self.kept)} that ran, got {stage}.")
        owner = torch.arange(self.visual_tokens[sample])
        for record in self.kept[: stage + 1 or None]:
            goes = torch.full_like(owner, -1)
            kept = record.indices[sample].cpu()
            goes[kept] = kept
            if record.merged is not None:
                token, into = record.merged[sample].cpu()
                goes[token] = into
            owner = torch.where(owner < 0, owner, goes[owner.clamp(min=0)])
        return owner

    def summary(self) -> str:
        """A few lines for people."""
        if not any(self.visual_tokens):
            return (
                f"no visual tokens in the last call ({sum(self.text_tokens)} text tokens in "
                f"{len(self.text_tokens)} sample(s)): nothing to prune, the model ran unchanged"
            )
        lines: list[str] = []
        for b, (total, average, row) in enumerate(
            zip(self.visual_tokens, self.average_tokens, self.tokens_per_layer, strict=True)
        ):
            text = self.text_tokens[b], self.text_kept[b]
            left = "" if text[0] == text[1] else f"; {text[1]} of {text[0]} text tokens"
            lines.append(f"sample {b}: {total} visual tokens, {average:.1f} a layer on average ({_runs(row)}){left}")
        for name, part, full in (
            ("decoder prefill FLOPs", self.flops, self.flops_full),
            ("vision FLOPs", self.vision_flops, self.vision_flops_full),
            ("KV cache bytes", self.kv_bytes, self.kv_bytes_full),
        ):
            if full:
                lines.append(f"{name}: {part:,} of {full:,} ({100 * part / full:.1f} %)")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; indices become lists."""
        return {
            "visual_tokens": list(self.visual_tokens),
            "text_tokens": list(self.text_tokens),
            "text_kept": list(self.text_kept),
            "tokens_per_layer": [list(row) for row in self.tokens_per_layer],
            "average_tokens": list(self.average_tokens),
            "restarted": list(self.restarted),
            "asked": [list(each) for each in self.asked],
            "kept": [
                {"site": str(k.site), "indices": _lists(k.indices)}
                | ({} if k.text is None else {"text": _lists(k.text)})
                | ({} if k.merged is None else {"merged": _lists(k.merged)})
                for k in self.kept
            ],
            "flops": self.flops,
            "flops_full": self.flops_full,
            "vision_flops": self.vision_flops,
            "vision_flops_full": self.vision_flops_full,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "notes": list(self.notes),
        }


def _lists(indices: tuple[Tensor, ...]) -> list[list[int]]:
    """One copy to the host a tensor, not one an element."""
    return [cast("list[int]", i.tolist()) for i in indices]  # pyright: ignore[reportUnknownMemberType]


def _runs(row: tuple[int, ...]) -> str:
    """(576, 576, 64, 64) -> 'layers 0-1: 576, 2-3: 64'."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(row) + 1):
        if i == len(row) or row[i] != row[start]:
            span = f"{start}-{i - 1}" if i - 1 > start else f"{start}"
            parts.append(f"{span}: {row[start]}")
            start = i
    return "layers " + ", ".join(parts)
