"""How each family was verified, read from what the contract tests wrote beside this file and never kept by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.hooks.families.base import FAMILIES, Family

__all__ = ["FamilyInfo", "family_infos"]

# written by `pytest --family-table`: {transformers release: {case: {"model", "family", "checks": {check: outcomes}}}}
_TABLE = Path(__file__).with_name("verified.json")
_UNTESTED = {"FAILED", "not run"}

Cases = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class FamilyInfo:
    """What a family serves and how that was verified.

    Attributes:
        name: registry key.
        summary: one line.
        model_types: `config.model_type` of the models it serves, () where it serves what no other does.
        verified: one sentence: which proofs, on what, with which transformers.
        models: for each tested model (its class, and the case where a class has several), what came of each contract
            test on the newest release tested: "pass", why it does not apply, or the message with which `prune()`
            refuses.
    """

    name: str
    summary: str
    model_types: tuple[str, ...]
    verified: str
    models: dict[str, dict[str, str]]


def family_infos(trained: Mapping[str, str], table: Mapping[str, Cases] | None = None) -> dict[str, FamilyInfo]:
    """All families.

    Args:
        trained: embedded trained models, name -> model_type; tests/test_embedded.py runs the invariants on them.
        table: results of the contract tests, unless given the stored ones.
    """
    known: Mapping[str, Cases] = json.loads(_TABLE.read_text(encoding="utf-8")) if table is None else table
    return {name: _info(name, family, trained, known) for name, family in FAMILIES.items()}


def _info(name: str, family: type[Family], trained: Mapping[str, str], table: Mapping[str, Cases]) -> FamilyInfo:
    mine = {release: _cases_of(name, cases) for release, cases in sorted(table.items(), key=_number)}
    releases = [release for release, cases in mine.items() if cases and not _untested(cases)]
    newest = mine[releases[-1]] if releases else {}
    proofs: list[str] = []
    if family.proves_itself:
        proofs.append("a dry call on every model when it is wrapped")
    if releases:
        models = ", ".join(dict.fromkeys(case["model"] for case in newest.values()))
        proofs.append(f"contract tests on tiny random {models} with transformers {', '.join(releases)}")
        proofs[-1] += f": {', '.join(_passed(newest))}"
    proofs += [
        f"the trained tiny:{tiny} against the masked oracle"
        for tiny, kind in trained.items()
        if kind in family.model_types
    ]
    return FamilyInfo(
        name=name,
        summary=family.summary,
        model_types=family.model_types,
        verified="; ".join(proofs) if proofs else "not verified",
        models={
            _label(name, newest): {check: "; ".join(said) for check, said in case["checks"].items()}
            for name, case in newest.items()
        },
    )


def _label(name: str, cases: Cases) -> str:
    """The class of a case, and its name where the class has several."""
    model = cases[name]["model"]
    return model if [case["model"] for case in cases.values()].count(model) == 1 else f"{model} ({name})"


def _number(entry: tuple[str, Any]) -> list[int]:
    return [int(part) for part in entry[0].split(".") if part.isdigit()]


def _cases_of(family: str, cases: Cases) -> Cases:
    return {name: case for name, case in cases.items() if case["family"] == family}


def _untested(cases: Cases) -> bool:
    return any(_UNTESTED & set(outcomes) for case in cases.values() for outcomes in case["checks"].values())


def _passed(cases: Cases) -> list[str]:
    """Checks that passed for all cases, or for those that have what is checked."""
    checks = next(iter(cases.values()))["checks"]
    return [check for check in checks if any(case["checks"][check] == ["pass"] for case in cases.values())]
