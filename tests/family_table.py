"""What each family passed, gathered from the reports of the contract tests: a page to read, a table for the package.

`pytest tests/test_famil*.py --family-table docs/families.md` writes both, the page from the table. A run of a part of
the tests updates the part of the table that it ran.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from family_models import CASES

from vtprune.hooks import verified
from vtprune.hooks.families.base import family_of

TABLE = Path(verified.__file__).with_name("verified.json")
RELEASE = transformers.__version__
_FILES = ("test_families.py", "test_family_pixels.py", "test_family_towers.py")
_TESTS = {
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
    "test_tower_cut_equals_masked_tower": "tower",
}
CHECKS = tuple(dict.fromkeys(_TESTS.values()))
_HEAD = f"""# What each family passed

Written by `pytest tests/test_famil*.py --family-table docs/families.md` on tiny random models of the real classes
(transformers {RELEASE}, CPU, fp32, sdpa and eager attention).
A refusal is what `prune()` says before anything runs.

* identity: `keep=1.0` gives the same bits in logits, ids and cache.
* masked oracle, decode: logits and 16 greedy steps equal those of the unpruned model in which the dropped tokens are
  hidden, for a lone prompt and a ragged batch; hiding other tokens does not.
* ragged batch: prompts with none, one and two images of different sizes give what each gives alone.
* multi-turn: a text turn and a turn with a new image over one cache; under M-RoPE the latter passes `position_ids`,
  because `generate` alone cannot place it.
* pixels: a spot on a picture changes the features of the tokens that the layout puts there, through the real image
  processor.
* tower: cuts inside the vision tower equal the tower in which the dropped patches are hidden.

"""
Outcomes = dict[tuple[str, str], set[str]]


def stored() -> dict[str, dict[str, Any]]:
    """The table in the package: transformers release -> case -> model, family and outcomes of each check."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}


def note(report: pytest.TestReport, outcomes: Outcomes) -> None:
    """Add what one test came to."""
    name, _, rest = report.nodeid.rpartition("::")[2].partition("[")
    cases = [c for c in sorted(CASES, key=len) if rest.startswith((f"{c}-", f"{c}]"))]
    ours = name in _TESTS and report.nodeid.partition("::")[0].endswith(_FILES) and cases
    if not ours or (report.when != "call" and report.passed):
        return
    said = dict(report.user_properties).get("refusal")
    outcome = "pass" if report.passed else "FAILED"
    if report.skipped:
        outcome = str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
    outcomes.setdefault((cases[-1], _TESTS[name]), set()).add(f"refused: {said}" if said else outcome)


def stale(outcomes: Outcomes) -> list[str]:
    """What the table says otherwise than the tests that have just run."""
    table = stored().get(RELEASE)
    if table is None:
        return []
    wrong = []
    for (case, check), seen in sorted(outcomes.items()):
        known = set(table.get(case, {}).get("checks", {}).get(check, ()))
        if new := seen - known - {"FAILED"}:
            wrong.append(f"{case}, {check}: {'; '.join(sorted(new))}")
    return wrong


def write(outcomes: Outcomes, page: Path) -> None:
    """Update the table by what has run, and write the page from it."""
    table = stored()
    old, new = table.get(RELEASE, {}), {}
    for name, case in sorted(CASES.items()):
        checks = old.get(name, {}).get("checks", {})
        new[name] = {
            "model": case.model_class,
            "family": family_of(case.config()).name,
            "checks": {c: sorted(outcomes.get((name, c), checks.get(c, ["not run"]))) for c in CHECKS},
        }
    TABLE.write_text(json.dumps(dict(sorted({**table, RELEASE: new}.items())), indent=1) + "\n", encoding="utf-8")
    lines = [f"| family | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for name, entry in new.items():
        lines.append(f"| `{name}` | {' | '.join('; '.join(entry['checks'][c]) for c in CHECKS)} |")
    page.write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
