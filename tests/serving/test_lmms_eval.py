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

# by task, answers and scores
Scored = dict[str, list[list]]
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
def in_vllm(documented: Path) -> Scored:
    """What the page's command scored, by task: answers and scores in order of the questions."""
    found = {}
    for task in TASKS:
        (file,) = documented.glob(f"runs/tiny/*_samples_{task}.jsonl")
        rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
        # vLLM's answers begin with the space before the first word, which the model `vtprune` cuts off
        found[task] = [[row["filtered_resps"].strip(), row["acc"]] for row in rows]
    return found


@pytest.fixture(scope="module")
def in_transformers(documented: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """What transformers scores with the same checkpoint, by budget."""
    out = tmp_path_factory.mktemp("lmms_eval") / "scores.json"
    _run([sys.executable, str(Path(__file__).with_name("lmms_scores.py")), str(documented / "tiny"), str(out)])
    return json.loads(out.read_text())


def test_lmms_eval_on_vllm_scores_as_on_transformers(in_vllm: Scored, in_transformers: dict[str, Scored]) -> None:
    assert all(len(scored) == LIMIT for scored in in_vllm.values())
    first, other = map(str, KEEPS)
    assert in_vllm == in_transformers[first]
    # the control: equal answers are not what any budget gives
    assert in_vllm != in_transformers[other]


def test_the_documented_command_scores_what_the_page_says(in_vllm: Scored) -> None:
    shares = [f"{100 * sum(score for _, score in in_vllm[task]) / LIMIT:.1f}".removesuffix(".0") for task in TASKS]
    assert f"{shares[0]} % of {LIMIT} scenes and {shares[1]} % of {LIMIT} questions of easy-VQA" in _PAGE.read_text()
