"""What pruning saved, per question and in sum, in the form that lmms-eval writes into its samples file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import TokenCounts

from vtprune.report import Report

__all__ = ["PrunedTokenCounts", "Totals", "kept_hash"]


def kept_hash(report: Report, sample: int) -> str:
    """12 hex digits that name the set of tokens each stage kept of one sample."""
    digest = hashlib.sha256()
    for record in report.kept:
        digest.update(f"{record.site}:{record.indices[sample].tolist()};".encode())
    return digest.hexdigest()[:12]


@dataclass
class PrunedTokenCounts(TokenCounts):
    """lmms-eval's counts of one question, and what happened to its visual tokens.

    Attributes:
        visual_tokens: before pruning.
        average_tokens: that entered a decoder layer, averaged over the layers.
        tokens_per_layer: that entered each decoder layer.
        kept_hash: names the kept set, for comparing runs.
        kept: the kept indices of every stage, if asked for.
        flops_share, kv_share: decoder prefill FLOPs and KV bytes against unpruned, of the batch as run.
    """

    visual_tokens: int = 0
    average_tokens: float = 0.0
    tokens_per_layer: tuple[int, ...] | None = None
    kept_hash: str | None = None
    kept: list[dict[str, Any]] | None = None
    flops_share: float = 1.0
    kv_share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """What lands in the samples file."""
        extra = {
            "visual_tokens": self.visual_tokens,
            "average_tokens": self.average_tokens,
            "tokens_per_layer": None if self.tokens_per_layer is None else list(self.tokens_per_layer),
            "kept_hash": self.kept_hash,
            "kept": self.kept,
            "flops_share": self.flops_share,
            "kv_share": self.kv_share,
        }
        return {**super().to_dict(), **{name: value for name, value in extra.items() if value is not None}}

    @classmethod
    def of_batch(
        cls,
        prompt: Sequence[int],
        answer: Sequence[int],
        visual: Sequence[int],
        report: Report | None,
        save_kept: bool = False,
    ) -> list[PrunedTokenCounts]:
        """Counts of every sample of a batch.

        Args:
            prompt: prompt tokens of each sample, before pruning.
            answer: generated tokens of each sample.
            visual: image placeholders of each sample.
            report: of the batch's prefill, None if nothing was attached.
            save_kept: store the kept indices too.
        """
        counts = []
        # beam search repeats each prompt, so the report has several rows a sample
        rows = 1 if report is None else len(report.visual_tokens) // len(prompt)
        for place, (into, out, seen) in enumerate(zip(prompt, answer, visual, strict=True)):
            sample = place * rows
            count = cls(input_tokens=into, output_tokens=out, visual_tokens=seen, average_tokens=float(seen))
            if report is not None:
                count.average_tokens = report.average_tokens[sample]
                count.tokens_per_layer = report.tokens_per_layer[sample]
                count.kept_hash = kept_hash(report, sample)
                count.flops_share = report.flops / report.flops_full
                count.kv_share = report.kv_bytes / report.kv_bytes_full
                if save_kept:
                    count.kept = [
                        {"site": str(record.site), "indices": record.indices[sample].tolist()} for record in report.kept
                    ]
            counts.append(count)
        return counts


@dataclass
class Totals:
    """Sums over the questions since the last `attach`; without a session every share is 1.

    Attributes:
        batches: (text tokens, visual tokens) of every sample of each batch, padding and pruning left out.
    """

    questions: int = 0
    visual_tokens: int = 0
    average_tokens: float = 0.0
    flops: int = 0
    flops_full: int = 0
    vision_flops: int = 0
    vision_flops_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    batches: list[tuple[tuple[int, int], ...]] = field(default_factory=list)

    def add(self, counts: Sequence[PrunedTokenCounts], report: Report | None) -> None:
        """Take in one batch."""
        self.questions += len(counts)
        self.visual_tokens += sum(count.visual_tokens for count in counts)
        self.average_tokens += sum(count.average_tokens for count in counts)
        if report is not None:
            self.batches.append(tuple(zip(report.text_tokens, report.visual_tokens, strict=True)))
            for name in ("flops", "vision_flops", "kv_bytes"):
                for total in (name, f"{name}_full"):
                    setattr(self, total, getattr(self, total) + getattr(report, total))

    def share(self, name: str) -> float:
        """Spent part of `flops`, `vision_flops` or `kv_bytes`; 1.0 where nothing was attached."""
        full = getattr(self, f"{name}_full")
        return getattr(self, name) / full if full else 1.0

    def to_dict(self) -> dict[str, float]:
        """Means a question and shares."""
        questions = max(1, self.questions)
        return {
            "visual_tokens": self.visual_tokens / questions,
            "average_tokens": self.average_tokens / questions,
            "flops_share": self.share("flops"),
            "vision_flops_share": self.share("vision_flops"),
            "kv_share": self.share("kv_bytes"),
        }
