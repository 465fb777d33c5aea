"""A finished question as JSON: what the API returns and what can be downloaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtprune.demo.ask import Answer, Race
    from vtprune.demo.settings import Settings

__all__ = ["Downloads", "record_of", "result_of"]


def result_of(race: Race, settings: Settings) -> dict[str, Any]:
    """Answers and costs.

    Returns:
        settings: as asked. `unpruned`: `answer`, `prefill_seconds`, `tokens_per_second`. `pruned`: one entry a method
        with these, `method`, `keep`, `same_answer`, `agreeing_tokens`, `plan` and `report` (`Report.to_dict()`).
        `timing_rounds`: over how many rounds seconds are medians.
    """
    full, *pruned = race.answers
    return {
        "settings": dataclasses.asdict(settings),
        "unpruned": _timed(full),
        "pruned": [_pruned(answer) for answer in pruned],
        "timing_rounds": race.rounds,
    }


def _timed(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "prefill_seconds": answer.prefill_s,
        "tokens_per_second": answer.tokens_per_s,
    }


def _pruned(answer: Answer) -> dict[str, Any]:
    run, report, plan = answer.run, answer.report, answer.plan
    return {
        "method": run and run.method,
        "keep": run and run.keep,
        **_timed(answer),
        "same_answer": answer.same,
        "agreeing_tokens": answer.agrees,
        "plan": plan and plan.to_dict(),
        "report": report and report.to_dict(),
    }


def record_of(race: Race, settings: Settings) -> dict[str, Any]:
    """What the first pruned answer kept: with `vtprune.replay` the same tokens can be kept again.

    Returns:
        `plan` and `kept` as `vtprune.replay` takes them, and what they belong to.
    """
    import torch
    import transformers

    import vtprune

    answer = race.answers[1]
    versions = {"vtprune": vtprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "settings": dataclasses.asdict(settings),
        "versions": versions,
        "plan": answer.plan and answer.plan.to_dict(),
        "kept": answer.report and answer.report.to_dict()["kept"],
        "tokens_per_layer": answer.report and list(answer.report.tokens_per_layer[0]),
    }


class Downloads:
    """Files for visitors; they are gone when the process ends."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="vtprune-demo-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def write(self, name: str, content: Any) -> str:
        """`content` as JSON in a file of this name, in a folder of its own; returns its path."""
        path = Path(tempfile.mkdtemp(dir=self._folder)) / name
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return str(path)
