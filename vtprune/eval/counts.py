"""What pruning saved, per question and in sum, in the form that lmms-eval writes into its samples file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lmms_eval.api.instance import TokenCounts

from vtprune.report import Report

__all__ = ["BatchCost", "PrunedTokenCounts", "Totals", "kept_hash"]

_FIGURES = tuple(figure for cost in ("flops", "vision_flops", "kv_bytes") for figure in (cost, f"{cost}_full"))


def kept_hash(report: Report, sample: int) -> str:
    """12 hex digits that name the set of tokens each stage kept of one sample."""
    digest = hashlib.sha256()
    for record in report.kept:
        digest.update(f"{record.site}:{record.indices[sample].tolist()};".encode())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class BatchCost:
    """What the batch that a question was asked in cost, padding included; 0 where nothing was attached.

    Attributes:
        name: unlike that of any other batch of the run.
        size: questions in it.
        prefill_ms: from the call of `generate` to the first token's logits, tower and scoring included.
        rows: of the batch that a question takes; more than one with beam search.
    """

    name: str
    size: int
    prefill_ms: float
    rows: int = 1
    flops: int = 0
    flops_full: int = 0
    vision_flops: int = 0
    vision_flops_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @classmethod
    def of(cls, name: str, size: int, prefill_ms: float, report: Report | None) -> BatchCost:
        """The figures of a report."""
        if report is None:
            return cls(name, size, prefill_ms)
        rows = len(report.visual_tokens) // size
        return cls(name, size, prefill_ms, rows, **{figure: getattr(report, figure) for figure in _FIGURES})


@dataclass
class PrunedTokenCounts(TokenCounts):
    """lmms-eval's counts of one question, and what happened to its visual tokens.

    Attributes:
        visual_tokens: before pruning.
        average_tokens: that entered a decoder layer, averaged over the layers.
        tokens_per_layer: that entered each decoder layer.
        kept_hash: names the kept set, for comparing runs.
        kept: the kept indices of every stage, if asked for.
        text_tokens: of the prompt that are neither visual nor padding, as the report counts them.
        batch: what the batch cost; None if it was not measured.
    """

    visual_tokens: int = 0
    average_tokens: float = 0.0
    tokens_per_layer: tuple[int, ...] | None = None
    kept_hash: str | None = None
    kept: list[dict[str, Any]] | None = None
    text_tokens: int | None = None
    batch: BatchCost | None = None

    @property
    def flops_share(self) -> float:
        """Decoder prefill FLOPs against unpruned, of the batch as run."""
        cost = self.batch
        return cost.flops / cost.flops_full if cost is not None and cost.flops_full else 1.0

    @property
    def kv_share(self) -> float:
        """KV bytes against unpruned, of the batch as run."""
        cost = self.batch
        return cost.kv_bytes / cost.kv_bytes_full if cost is not None and cost.kv_bytes_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """What lands in the samples file."""
        extra = {
            "visual_tokens": self.visual_tokens,
            "average_tokens": self.average_tokens,
            "tokens_per_layer": None if self.tokens_per_layer is None else list(self.tokens_per_layer),
            "kept_hash": self.kept_hash,
            "kept": self.kept,
            "text_tokens": self.text_tokens,
            "flops_share": self.flops_share,
            "kv_share": self.kv_share,
            "batch": None if self.batch is None else asdict(self.batch),
        }
        return {**super().to_dict(), **{name: value for name, value in extra.items() if value is not None}}

    @classmethod
    def of_batch(
        cls,
        prompt: Sequence[int],
        answer: Sequence[int],
        visual: Sequence[int],
        report: Report | None,
        batch: BatchCost,
        save_kept: bool = False,
    ) -> list[PrunedTokenCounts]:
        """Counts of every sample of a batch.

        Args:
            prompt: prompt tokens of each sample, before pruning.
            answer: generated tokens of each sample.
            visual: image placeholders of each sample.
            report: of the batch's prefill, None if nothing was attached.
            batch: what it cost.
            save_kept: store the kept indices too.
        """
        counts = []
        for place, (into, out, seen) in enumerate(zip(prompt, answer, visual, strict=True)):
            sample = place * batch.rows
            count = cls(input_tokens=into, output_tokens=out, visual_tokens=seen, average_tokens=float(seen))
            count.batch = batch
            if report is not None:
                count.average_tokens = report.average_tokens[sample]
                count.tokens_per_layer = report.tokens_per_layer[sample]
                count.kept_hash = kept_hash(report, sample)
                count.text_tokens = report.text_tokens[sample]
                if save_kept:
                    count.kept = [
                        {"site": str(record.site), "indices": record.indices[sample].tolist()} for record in report.kept
                    ]
            counts.append(count)
        return counts


@dataclass
class Totals:
    """Sums over questions; without a session every share is 1.

    Attributes:
        batches: (text tokens, visual tokens) of every sample of each batch that was pruned, padding and pruning left
            out.
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

    @classmethod
    def of(cls, counts: Iterable[Mapping[str, Any]]) -> Totals:
        """Sums over questions as `PrunedTokenCounts.to_dict` wrote them; a batch's cost counts once."""
        totals, batches = cls(), dict[str, list[Mapping[str, Any]]]()
        for count in counts:
            totals.questions += 1
            totals.visual_tokens += count.get("visual_tokens", 0)
            totals.average_tokens += count.get("average_tokens", 0.0)
            batches.setdefault((count.get("batch") or {}).get("name", ""), []).append(count)
        for members in batches.values():
            cost = members[0].get("batch")
            if cost is None or not cost["flops_full"]:
                continue
            samples = [(c["text_tokens"], c["visual_tokens"]) for c in members for _ in range(cost["rows"])]
            totals.batches.append(tuple(samples))
            for figure in _FIGURES:
                setattr(totals, figure, getattr(totals, figure) + cost[figure])
        return totals

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
