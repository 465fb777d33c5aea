"""Set-up of the whole test run, and the table of what each family passed."""

from __future__ import annotations

from pathlib import Path

import generic_models  # noqa: F401 (adds its cases)
import pytest
import torch
import transformers
from family_models import CASES

# the models are so small that a second thread costs more than it computes, and pytest already runs two processes
torch.set_num_threads(1)

_HEAD = f"""# What each family passed

Written by `pytest tests/test_families.py tests/test_family_pixels.py --family-table docs/families.md` on tiny random
models of the real classes (transformers {transformers.__version__}, CPU, fp32, sdpa and eager attention).
A refusal is what `prune()` says before anything runs.

* identity: `keep=1.0` gives the same bits in logits, ids and cache.
* masked oracle, decode: logits and 16 greedy steps equal those of the unpruned model in which the dropped tokens are
  hidden, for a lone prompt and a ragged batch; hiding other tokens does not.
* ragged batch: prompts with none, one and two images of different sizes give what each gives alone.
* multi-turn: a text turn and a turn with a new image over one cache; under M-RoPE the latter passes `position_ids`,
  because `generate` alone cannot place it.
* pixels: a spot on a picture changes the features of the tokens that the layout puts there, through the real image
  processor.
* tower: cuts inside the vision tower.

"""
_CHECKS = {
    "test_keep_all_is_bit_identical": "identity",
    "test_pruned_run_equals_masked_oracle": "masked oracle, decode",
    "test_batch_equals_each_sample_alone": "ragged batch",
    "test_beams_equal_masked_oracle": "beams",
    "test_turns_over_one_cache_equal_masked_oracle": "multi-turn",
    "test_videos_equal_masked_oracle": "video",
    "test_gradients_flow_and_equal_the_oracle": "gradients",
    "test_remove_leaves_nothing": "removal",
    "test_a_spot_changes_the_tokens_over_it": "pixels",
    "test_cuts_in_the_tower_run_or_are_refused": "tower",
}
_outcomes: dict[tuple[str, str], set[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family-table", metavar="FILE", help="write which family passed which contract test")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name, _, rest = report.nodeid.rpartition("::")[2].partition("[")
    family = next(
        (part for part in sorted(CASES, key=len, reverse=True) if rest.startswith((f"{part}-", f"{part}]"))), ""
    )
    if name not in _CHECKS or not family or (report.when != "call" and report.passed):
        return
    said = dict(report.user_properties).get("refusal")
    outcome = "pass" if report.passed else "FAILED"
    if report.skipped:
        outcome = str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
    _outcomes.setdefault((family, _CHECKS[name]), set()).add(f"refused: {said}" if said else outcome)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--family-table")
    if not target:
        return
    columns = list(_CHECKS.values())
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for family in sorted(CASES):
        cells = ["; ".join(sorted(_outcomes.get((family, column), {"not run"}))) for column in columns]
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    Path(target).write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
