"""lmms-eval's own model `vllm`, served by the plugin, gives the answers and scores that it gives with transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_scores import KEEPS, LIMIT, TASKS

from vtprune.integrations.vllm.embedded import export

# answers and scores in order of the questions, by budget and task
Scored = dict[str, dict[str, list[tuple[str, float]]]]
_BUDGETS = [str(keep) for keep in KEEPS]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """What vLLM and transformers score with the same checkpoint: the trained model, its heads widened."""
    root = tmp_path_factory.mktemp("lmms_eval")
    folder = export("tiny:qwen2_vl", root / "checkpoint")
    found = {}
    for side in ("vllm", "transformers"):
        out = root / f"{side}.json"
        command = [sys.executable, str(Path(__file__).with_name("lmms_scores.py")), side, str(folder), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]
        found[side] = json.loads(out.read_text())
    return found


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
