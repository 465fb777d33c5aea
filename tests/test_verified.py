"""`vtprune.families()` says what the contract tests said, of every family and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from family_models import CASES
from family_table import CHECKS, Outcomes, stale, stored, write

import vtprune
from vtprune.hooks.families.base import FAMILIES, family_of
from vtprune.hooks.verified import family_infos
from vtprune.tiny import tiny_model_types

OLDEST = "5.16."  # see pyproject.toml
RERUN = "run the contract tests with --family-table"


def test_the_table_holds_every_case_on_the_oldest_and_a_newer_transformers() -> None:
    table = stored()
    assert any(release.startswith(OLDEST) for release in table), RERUN
    assert any(not release.startswith(OLDEST) for release in table), RERUN
    for release, cases in table.items():
        assert sorted(cases) == sorted(CASES), (release, RERUN)
        for name, entry in cases.items():
            family = family_of(CASES[name].config()).name
            assert (entry["model"], entry["family"]) == (CASES[name].model_class, family), (name, RERUN)
            assert list(entry["checks"]) == list(CHECKS), (name, RERUN)
            for check, outcomes in entry["checks"].items():
                assert outcomes, (name, check, RERUN)
                assert not {"FAILED", "not run"} & set(outcomes), (release, name, check, RERUN)


def test_every_family_was_verified() -> None:
    infos = vtprune.families()
    assert list(infos) == list(FAMILIES)
    for name, info in infos.items():
        family = FAMILIES[name]
        assert (info.name, info.summary, info.model_types) == (name, family.summary, family.model_types)
        assert all(release in info.verified for release in stored()), info
        assert "identity, masked oracle, decode" in info.verified
        cases = [entry for entry in max(stored().items())[1].values() if entry["family"] == name]
        assert len(info.models) == len(cases) > 0
        assert all(info.verified.count(f" {entry['model']}") == 1 for entry in cases)
        assert all(set(checks) == set(CHECKS) for checks in info.models.values())
    assert infos["llava"].verified.startswith("contract tests on tiny random LlavaForConditionalGeneration with")
    assert infos["generic"].verified.startswith("a dry call on every model when it is wrapped; contract tests on")
    for tiny, kind in tiny_model_types().items():
        (served,) = (name for name, info in infos.items() if f"the trained tiny:{tiny} against" in info.verified)
        assert kind in infos[served].model_types


def _entry(**checks: list[str]) -> dict[str, Any]:
    return {"model": "LlavaForConditionalGeneration", "family": "llava", "checks": checks}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "not verified"),
        ({"5.16.0": {}}, "not verified"),
        ({"5.16.0": {"llava": _entry(identity=["not run"])}}, "not verified"),
        ({"5.16.0": {"llava": _entry(identity=["FAILED", "pass"])}}, "not verified"),
        (
            {"5.16.0": {"llava": _entry(identity=["pass"], tower=["refused: no"], video=["no videos"])}},
            "contract tests on tiny random LlavaForConditionalGeneration with transformers 5.16.0: identity",
        ),
        (
            {"5.9.0": {"llava": _entry(identity=["pass"])}, "5.16.0": {"llava": _entry(identity=["pass"])}},
            "contract tests on tiny random LlavaForConditionalGeneration with transformers 5.9.0, 5.16.0: identity",
        ),
    ],
)
def test_nothing_is_called_verified_that_did_not_pass(table: Any, said: str) -> None:
    assert family_infos({}, table)["llava"].verified == said
    assert family_infos({"llava": "llava"}, table)["llava"].verified.endswith(
        "the trained tiny:llava against the masked oracle"
    )


def test_a_run_that_says_otherwise_than_the_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("family_table.TABLE", tmp_path / "verified.json")
    outcomes: Outcomes = {("llava", "identity"): {"pass"}, ("llava", "tower"): {"refused: no"}}
    assert stale(outcomes) == []  # this release has no entry yet
    write(outcomes, tmp_path / "page.md")
    assert stale(outcomes) == []
    assert stale({("llava", "tower"): {"pass"}}) == ["llava, tower: pass"]
    assert stale({("llava", "tower"): {"FAILED"}}) == []  # red anyway
    write({("llava", "tower"): {"pass"}}, tmp_path / "page.md")
    entry = stored()[transformers.__version__]["llava"]
    assert entry["checks"]["tower"] == ["pass"]
    assert entry["checks"]["identity"] == ["pass"], "what did not run again keeps what it had"
    assert "| `llava` | pass | not run |" in (tmp_path / "page.md").read_text(encoding="utf-8")
