"""Set-up of the whole test run, and the table of what each family passed."""

from __future__ import annotations

from pathlib import Path

import interpreter  # noqa: F401 (before anything that imports Triton)

# isort: split
import family_table
import generic_models  # noqa: F401 (adds its cases)
import pytest
import torch

# the models are so small that a second thread costs more than it computes, and pytest already runs two processes
torch.set_num_threads(1)

# run by `make test-vllm`, in an environment that has vLLM
collect_ignore = ["serving"]

_outcomes: family_table.Outcomes = {}
# on a second attention backend these would take as long again; `-m slow` runs them there
_ONE_BACKEND = ("test_embedded", "test_families", "test_family_towers", "test_tower_budgets", "test_windows")


# what asks layers is tried on families that differ in their layers, and on the others with `-m slow`
_ASKING = ("_asked_", "-gemfilter]", "-transprune]")
_ANY = ("test_equals_masked_oracle[", "test_knows_no_batch_mates[")
_LEARNED = ("-atp]", "-relevance]")
# methods whose rules have tests of their own: one of them on one embedded model, and one backend elsewhere
_REST = ("cdpruner", "dart", "fastervlm", "hiprune", "holov", "prumerge", "pyramiddrop", "scope", "sparsevlm")
_REST += ("spatten", "tome", "vispruner", "visionzip")
_REST += ("evs", "uniform-frames", "vidcom2")
_DIFFER = ("[llava-", "[llava]", "[qwen2_vl", "[qwen3_vl", "[gemma3", "[idefics2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        twice = item.path.stem in _ONE_BACKEND and "eager" in item.name
        asks = item.path.stem == "test_families" and any(word in item.name for word in _ASKING)
        asks = asks or (item.path.stem == "test_any_token" and item.name.startswith(_ANY))
        # learned methods cut by the same engine: on one model and backend by default
        learned = item.path.stem in ("test_embedded", "test_invariants") and item.name.endswith(_LEARNED)
        twice = twice or (learned and ("eager" in item.name or "qwen2_vl" in item.name or "internvl" in item.name))
        rest = any(name in item.name for name in _REST)
        twice = twice or (rest and item.path.stem == "test_embedded" and "[llava-sdpa-visionzip]" not in item.name)
        twice = twice or (rest and item.path.stem in ("test_cost", "test_invariants") and "eager" in item.name)
        compiles = "compiled_decode" in item.name
        # and so does what trains a net, or kills a process that does
        compiles = compiles or "trained" in getattr(item, "fixturenames", ()) or "a_killed_process" in item.name
        if twice or compiles or (asks and not any(name in item.name for name in _DIFFER)):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family-table", metavar="FILE", help="write which family passed which contract test")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    family_table.note(report, _outcomes)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # the process that started the workers has all reports
    target = session.config.getoption("--family-table")
    if target:
        family_table.write(_outcomes, Path(target))
    elif family_table.stale(_outcomes):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--family-table"):
        return
    for line in family_table.stale(_outcomes):
        terminalreporter.write_line(
            f"STALE in vtprune/hooks/verified.json (rerun with --family-table): {line}", red=True
        )
