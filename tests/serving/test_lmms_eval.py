"""lmms-eval's own model `vllm`, served by the plugin, gives the answers and scores that it gives with transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import ENVIRONMENT
from lmms_scores import KEEPS, LIMIT, TASKS

# answers and scores in order of the questions, by budget and task
Scored = dict[str, dict[str, list[tuple[str, float]]]]
_BUDGETS = [str(keep) for keep in KEEPS]
_PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands ran: they export `tiny`, the trained model with wider heads, and score it in vLLM."""
    block = next(b for b in re.findall(r"```sh\n(.*?)```", _PAGE.read_text(), re.DOTALL) if "--model vllm" in b)
    root = tmp_path_factory.mktemp("documented")
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT['PATH']}"
    ran = _run(["bash", "-ec", block], cwd=root, env={**ENVIRONMENT, "PATH": path})
    # lmms-eval's status says nothing
    assert list(root.glob("runs/tiny/*_results.json")), ran.stdout[-2000:] + ran.stderr[-4000:]
    return root


def _run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Programs of their own: an engine in this process changes the classes of transformers that it serves."""
    ran = subprocess.run(command, capture_output=True, text=True, **{"env": ENVIRONMENT, **options})
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran


@pytest.fixture(scope="module")
def sides(documented: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """What vLLM and transformers score with the same checkpoint."""
    root = tmp_path_factory.mktemp("lmms_eval")
    found = {}
    for side in ("vllm", "transformers"):
        out = root / f"{side}.json"
        program = str(Path(__file__).with_name("lmms_scores.py"))
        _run([sys.executable, program, side, str(documented / "tiny"), str(out)])
        found[side] = json.loads(out.read_text())
    return found


def test_the_documented_command_scores_what_the_page_says(documented: Path, sides: dict[str, Scored]) -> None:
    shares = []
    for task in TASKS:
        (file,) = documented.glob(f"runs/tiny/*_samples_{task}.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found = [[row["filtered_resps"].strip(), row["acc"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        assert found == sides["transformers"][_BUDGETS[0]][task]
        shares.append(f"{100 * sum(row['acc'] for row in rows) / len(rows):.1f}".removesuffix(".0"))
    assert f"{shares[0]} % of {LIMIT} scenes and {shares[1]} % of {LIMIT} questions of easy-VQA" in _PAGE.read_text()


def test_lmms_eval_on_vllm_scores_as_on_transformers(sides: dict[str, Scored]) -> None:
    assert sides["vllm"] == sides["transformers"]
    scored = sides["vllm"]
    assert list(scored) == _BUDGETS
    assert all(len(scored[keep][task]) == LIMIT for keep in _BUDGETS for task in TASKS)
    # a trained model reads the pictures: most is right with all tokens, and less with three of them
    right = {keep: sum(score for task in TASKS for _, score in scored[keep][task]) for keep in _BUDGETS}
    assert right["100%"] > 0.75 * LIMIT * len(TASKS)
    assert right["3"] < right["100%"]


def test_another_budget_scores_otherwise(sides: dict[str, Scored]) -> None:
    """The control: equal answers are not what any budget gives."""
    for place, keep in enumerate(_BUDGETS):
        for other in _BUDGETS[place + 1 :]:
            assert sides["vllm"][keep] != sides["transformers"][other], (keep, other)
