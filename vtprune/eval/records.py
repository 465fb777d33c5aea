"""Every answer of a sweep in one file, for people's own analyses: JSON lines without, Parquet with what was kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune.eval.sweep import SweepResult

__all__ = ["write_predictions", "write_records"]

_COSTS = ("flops", "flops_full", "flops_share", "kv_share", "prefill_ms", "batch", "batch_size", "kept")


def write_predictions(result: SweepResult, path: Path) -> None:
    """One JSON object a question and cell: what was answered, and a name for what was kept.

    What the batch cost is left out, so that the same answers make the same file whoever shared the work.
    """
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(result):
            file.write(json.dumps({name: value for name, value in line.items() if name not in _COSTS}) + "\n")


def write_records(result: SweepResult, path: Path) -> None:
    """The same as Parquet, with the indices that each stage kept; `datasets.load_dataset("parquet", ...)` reads it."""
    import pyarrow
    import pyarrow.parquet

    text, integer, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    stage = pyarrow.struct([("site", text), ("indices", pyarrow.list_(pyarrow.int32()))])
    types = dict.fromkeys(("method", "keep", "task", "image_id", "kind", "question", "answer", "prediction"), text)
    types |= {"doc_id": integer, "seed": integer, "score": real, "kept_hash": text, "visual_tokens": integer}
    types |= {"average_tokens": real, "tokens_per_layer": pyarrow.list_(pyarrow.int32()), "flops": integer}
    types |= {"flops_full": integer, "flops_share": real, "kv_share": real, "prefill_ms": real, "batch": text}
    types |= {"batch_size": integer, "kept": pyarrow.list_(stage)}
    schema = pyarrow.schema(list(types.items()), metadata={"run": json.dumps(result.rows[0].run)})
    table = pyarrow.Table.from_pylist(list(_lines(result)), schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _lines(result: SweepResult) -> Iterator[dict[str, Any]]:
    rows = {row.name: row for row in result.rows}
    for name, answers in result.answers.items():
        row = rows[name]
        for sample in (sample for samples in answers.samples.values() for sample in samples):
            counts, batch = sample.counts, sample.counts.get("batch") or {}
            yield {
                "method": row.method,
                "keep": row.keep,
                "task": sample.task,
                "doc_id": sample.doc_id,
                "seed": sample.seed,
                "image_id": sample.image_id,
                "kind": sample.kind,
                "question": sample.question,
                "answer": sample.answer,
                "prediction": sample.prediction,
                "score": sample.score,
                "kept_hash": counts.get("kept_hash"),
                "visual_tokens": counts.get("visual_tokens"),
                "average_tokens": counts.get("average_tokens"),
                "tokens_per_layer": counts.get("tokens_per_layer"),
                # a padded batch costs every question in it the same
                "flops": batch.get("flops", 0) // batch.get("size", 1),
                "flops_full": batch.get("flops_full", 0) // batch.get("size", 1),
                "flops_share": counts.get("flops_share"),
                "kv_share": counts.get("kv_share"),
                "prefill_ms": batch.get("prefill_ms"),
                "batch": batch.get("name"),
                "batch_size": batch.get("size"),
                "kept": counts.get("kept"),
            }
