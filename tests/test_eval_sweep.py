"""Sweeps that are interrupted, repeated, described in a file, asked with several seeds, or run over broken tasks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eval_helpers
import pytest
from typer.testing import CliRunner, Result

from vtprune.cli import app
from vtprune.errors import InputError
from vtprune.eval import task_data
from vtprune.eval.harness import Harness, Sample
from vtprune.eval.rows import read_rows
from vtprune.eval.store import CellKey, CellResult, CellStore, read_cell, settings_of


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    yield from eval_helpers.few_images(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_helpers.save_askable(tmp_path_factory.mktemp("askable"))


def run(folder: Path, out: Path, arguments: str = "") -> Result:
    common = f"eval --model {folder} --methods random,fastv --keeps 1/2,1/4 --limit 3 --fast --against none"
    return CliRunner().invoke(app, [*common.split(), "--out", str(out), *arguments.split()])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(out: Path) -> list[dict[str, Any]]:
    """Rows without what was timed and how the command was written."""
    rows = [row.to_dict() for row in read_rows(out / "rows.jsonl")]
    for row in rows:
        row["run"] = {name: value for name, value in row["run"].items() if name != "command"}
        row["prefill_ms"] = row["prefill_ratio"] = None
    return rows


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    result = run(folder, out)
    assert result.exit_code == 0, result.output
    assert "cells were there already" not in result.output
    return out


# the store


KEY = CellKey("fastv(layer=2)", 0.25, "vtp_scenes", 0, "average", {"model": "m", "limit": 3})


def test_cells_survive_the_file(tmp_path: Path) -> None:
    sample = Sample("vtp_scenes", 0, "i", "what?", "red", "color", "blue", 0.0, {"kept": [{"site": "input"}]}, 0)
    result = CellResult("ok", plan={"stages": []}, samples=[sample], seconds=1.5)
    store = CellStore(tmp_path)
    assert store.load(KEY) is None
    store.save(KEY, result, "printed")
    assert CellStore(tmp_path).load(KEY) == result
    (path,) = (tmp_path / "cells").iterdir()
    assert path.name.startswith("fastv_layer_2-0.25-vtp_scenes-seed0-")
    assert (tmp_path / "logs" / f"{path.stem}.log").read_text(encoding="utf-8") == "printed"
    # asked again on purpose, but not twice in one sweep
    fresh = CellStore(tmp_path, fresh=True)
    assert fresh.load(KEY) is None
    fresh.save(KEY, result)
    assert fresh.load(KEY) == result
    # what failed is tried again
    store.save(KEY, CellResult("failed", "Traceback"))
    assert store.load(KEY) is None
    assert CellStore(None).load(KEY) is None


@pytest.mark.parametrize(
    "change",
    [
        {"method": "fastv"},
        {"keep": 0.5},
        {"keep": None},
        {"task": "vtp_easy_vqa"},
        {"seed": None},
        {"basis": "final"},
        {"settings": {"model": "m", "limit": 4}},
    ],
)
def test_other_questions_are_other_cells(change: dict[str, Any], tmp_path: Path) -> None:
    import dataclasses

    store = CellStore(tmp_path)
    store.save(KEY, CellResult())
    assert store.load(dataclasses.replace(KEY, **change)) is None
    assert store.load(dataclasses.replace(KEY)) is not None


def test_a_damaged_cell_names_its_file(tmp_path: Path) -> None:
    sample = Sample("t", 0, "i", "", "", None, "", 1.0)
    store = CellStore(tmp_path)
    store.save(KEY, CellResult(samples=[sample, sample]))
    (path,) = (tmp_path / "cells").iterdir()
    text = path.read_text(encoding="utf-8")
    for damage in (text.rsplit("{", 1)[0], text[:-20], text.replace('"vtprune_cell": 1', '"vtprune_cell": 2'), ""):
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(InputError, match=rf"{re.escape(path.name)}.*Delete it"):
            store.load(KEY)
    path.write_text(text, encoding="utf-8")
    assert read_cell(path)[1].samples == [sample, sample]


def test_a_changed_checkpoint_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = settings_of(str(tmp_path), {})
    assert settings_of(str(tmp_path), {}) == before
    (tmp_path / "config.json").write_text("{ }", encoding="utf-8")
    assert settings_of(str(tmp_path), {}) != before
    assert settings_of("org/model", {"torch": "2"}) != settings_of("org/model", {"torch": "3"})
    assert settings_of("tiny:llava", {})["files"] != settings_of("tiny:internvl", {})["files"] != []


def test_changed_code_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vtprune
    from vtprune.eval import store

    (tmp_path / "scorers").mkdir()
    (tmp_path / "__init__.py").write_text("", encoding="utf-8")
    scorer = tmp_path / "scorers" / "a.py"
    scorer.write_text("x = 1", encoding="utf-8")
    monkeypatch.setattr(vtprune, "__file__", str(tmp_path / "__init__.py"))
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        scorer.write_text(text, encoding="utf-8")
        store._code.cache_clear()
        found.append(settings_of("org/model", {})["code"])
    store._code.cache_clear()
    assert found[0] == found[2] != found[1]


# resuming


def test_a_repeated_sweep_asks_nothing_and_says_the_same(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = shutil.copytree(whole, tmp_path / "again")
    monkeypatch.setattr(Harness, "run", lambda *_, **__: pytest.fail("asked again"))
    result = run(folder, out)
    assert result.exit_code == 0, result.output
    # unpruned, and two methods at two budgets, on two tasks
    assert "10 cells were there already" in result.output
    assert figures(out) == figures(whole)
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    # another budget asks only for itself
    monkeypatch.undo()
    result = run(folder, out, "--methods random --keeps 1/2,1/8")
    assert "4 cells were there already" in result.output
    assert [row["keep"] for row in figures(out)] == ["1", "1/2", "1/8"]
    for other in ("--fresh", "--limit 2", "--batch-size 2", "--dtype bfloat16", "--seeds 4", "--no-save-kept"):
        result = run(folder, out, f"--methods random --keeps 1/2 --rounds 0 --tasks vtp_scenes {other}")
        assert "there already" not in result.output, other


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(folder: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL while the fourth cell is asked: three are there, and the rest comes with the next start."""
    code = (
        "import os, signal, sys\n"
        "from vtprune.eval import task_data\n"
        "task_data.IMAGES = 4\n"
        "from vtprune.eval.harness import Harness\n"
        "calls, real = [], Harness.run\n"
        "def run(self, *a, **k):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *a, **k)\n"
        "Harness.run = run\n"
        "from vtprune.cli import app\n"
        "app(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    arguments = f"eval --model {folder} --methods random,fastv --keeps 1/2,1/4 --limit 3 --fast --against none"
    command = [sys.executable, "-c", code, *arguments.split(), "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert len(list((out / "cells").iterdir())) == 3
    assert not (out / "rows.jsonl").exists()
    result = run(folder, out)
    assert result.exit_code == 0, result.output
    assert "3 cells were there already" in result.output
    assert figures(out) == figures(whole)


# seeds, files, suites


def test_rows_have_the_answers_of_all_seeds(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "--seeds 0,1 --keeps 1/4 --tasks vtp_scenes")
    assert result.exit_code == 0, result.output
    unpruned, random, fastv = read_rows(tmp_path / "rows.jsonl")
    for row in (unpruned, random, fastv):
        assert row.tasks["vtp_scenes"].questions == 6
        assert row.run["seeds"] == [0, 1]
    cells = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "cells").iterdir()}
    # a method that draws draws anew, one that does not asks the other questions all the same
    assert cells == {
        *(f"{name}-seed{seed}" for name in ("unpruned-1-vtp_scenes", "fastv-0.25-vtp_scenes") for seed in (0, 1)),
        "random-0.25-vtp_scenes-seed0",
        "random_seed_1-0.25-vtp_scenes-seed1",
    }
    asked = [(line["seed"], line["doc_id"], line["image_id"]) for line in lines(tmp_path / "predictions.jsonl")[:6]]
    assert [seed for seed, *_ in asked] == [0, 0, 0, 1, 1, 1]
    assert len(set(asked)) == 6


def test_a_sweep_in_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"model: {folder}\nmethods: [random, 'fastv(layer=1)']\nkeeps: [1, 1/4]\nlimit: 2\nbatch-size: 2\nfast: true\n"
        "tasks: [vtp_scenes]\nagainst: none\nseeds: 3\nsave_kept: false\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["eval", "--config", str(file), "--limit", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = read_rows(out / "rows.jsonl")
    assert [(row.method, row.keep) for row in rows[1:]] == [("random", "1/4"), ("fastv(layer=1)", "1/4")]
    # the command line goes before the file
    assert rows[0].tasks["vtp_scenes"].questions == 3
    assert (rows[0].run["seed"], rows[0].run["batch_size"]) == (3, 2)
    cell = next((out / "cells").glob("random*"))
    assert all("kept" not in sample.counts for sample in read_cell(cell)[1].samples)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("method: [fastv]", "Unknown option in 'sweep.yaml' 'method'. Did you mean 'methods'"),
        ("config: other.yaml", "Unknown option in 'sweep.yaml' 'config'"),
        ("- fastv", "must set options by name"),
        ("methods: {fastv: 1}", "must be a value or a list of values"),
        ("methods: [fastv", "is not YAML"),
        ("limit: many", "as an integer"),
        ("seeds: [0, -1]", "seeds must be numbers"),
        ("seeds: [1, 1]", "seeds must be different"),
        ("replay: nowhere", "holds no rows.jsonl"),
    ],
)
def test_bad_files_end_with_a_message(text: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["eval", "--config", "sweep.yaml", "--out", "out"])
    assert result.exit_code == 2, result.output
    assert match in re.sub(r"[\s│]+", " ", result.output)
    assert CliRunner().invoke(app, ["eval", "--config", "gone.yaml"]).exit_code == 2


def test_suites_are_tasks_of_lmms_eval() -> None:
    from lmms_eval.tasks import TaskManager

    from vtprune.eval.harness import quiet
    from vtprune.eval.suites import SUITES, expand_suites
    from vtprune.eval.task_loading import check_names

    assert expand_suites(["pope", "llava15", "gqa"])[:3] == ("pope", "gqa", "mmbench_en_dev_static")
    assert len(expand_suites(["llava15", "llava15"])) == 8
    assert {"llava15", "ocr", "video", "grounding", "embedded"} <= set(SUITES)
    with quiet():
        manager = TaskManager("WARNING", include_path=[str(task_data.__file__ and Path(task_data.__file__).parent)])
    for name, tasks in SUITES.items():
        check_names(tasks, manager)
        for task in tasks:
            try:
                config = manager._get_config(task)
            except ImportError:
                # what reads films or boxes need not be installed to know the name
                assert name in ("video", "grounding"), task
                continue
            assert config["output_type"] == "generate_until", (name, task)
            assert config["metric_list"]
    with pytest.raises(InputError, match="Did you mean llava15"):
        check_names(["llava_15"], manager)


def test_families_are_asked_with_their_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.eval.runner import run_sweep
    from vtprune.eval.sweep import Sweep

    for model, name in (("tiny:llava", "llava_hf"), ("tiny:qwen2_vl", "qwen2_vl"), ("tiny:internvl", "internvl_hf")):
        sweep = Sweep((), (), ("vtp_scenes",), model, limit=1, rounds=0, against=None)
        _, harness, _ = run_sweep(sweep, eval_helpers.Silent())
        assert harness._manager.model_name == name


# broken tasks


def test_a_task_without_data_costs_the_others_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    start = time.perf_counter()
    result = run(folder, tmp_path / "out", "--tasks pope,vtp_scenes --methods random --keeps 1/4")
    assert result.exit_code == 1, result.output
    assert "FAILED task pope: " in result.output
    text = re.sub(r"\s+", " ", result.output)
    assert "hf download --repo-type dataset lmms-lab-encoder/POPE" in text
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [list(row.tasks) for row in rows] == [["vtp_scenes"]] * 2
    # at once, and not after five attempts of ten seconds each
    assert time.perf_counter() - start < 300
    only = run(folder, tmp_path / "out", "--tasks pope --methods random --keeps 1/4")
    assert only.exit_code == 2, only.output
    assert "no task can be asked: pope" in re.sub(r"\s+", " ", only.output)


@pytest.mark.parametrize("when", ["unpruned", "pruned", "second seed"])
def test_a_task_that_breaks_while_it_is_asked_is_isolated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real, asked = Harness.run, list[Harness]()
    seeds = "--seeds 0,1" if when == "second seed" else ""

    def broken(self: Harness, model: Any, tasks: Any = None, **more: Any) -> Any:
        if "vtp_scenes" in tasks and (model.session is None) == (when == "unpruned"):
            asked.append(self)
            if when != "second seed" or asked[0] is not self:
                raise ValueError("scenes broke")
        return real(self, model, tasks, **more)

    monkeypatch.setattr(Harness, "run", broken)
    against = "none" if seeds else "uniform"
    result = run(folder, tmp_path, f"--methods random --keeps 1/4 --against {against} {seeds}")
    assert result.exit_code == 1, result.output
    title = "task vtp_scenes" if when == "unpruned" else "random 1/4 on vtp_scenes"
    assert f"FAILED {title}: ValueError: scenes broke" in result.output
    unpruned, pruned = read_rows(tmp_path / "rows.jsonl")
    assert set(unpruned.tasks) == ({"vtp_easy_vqa"} if when == "unpruned" else set(eval_helpers.TASKS))
    assert set(pruned.tasks) == {"vtp_easy_vqa"}
    assert pruned.status == "ok"
    assert ("ValueError: scenes broke" in pruned.missing.get("vtp_scenes", "")) is (when != "unpruned")
    assert any("scenes broke" in path.read_text(encoding="utf-8") for path in (tmp_path / "logs").iterdir())
    # only what failed is asked again
    monkeypatch.undo()
    again = run(folder, tmp_path, f"--methods random --keeps 1/4 --against none {seeds}")
    assert again.exit_code == 0, again.output
    assert set(read_rows(tmp_path / "rows.jsonl")[1].tasks) == set(eval_helpers.TASKS)


# records


def test_every_answer_is_in_the_records(whole: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(whole / "records.parquet")
    records, said = table.to_pylist(), lines(whole / "predictions.jsonl")
    assert len(records) == len(said) == 5 * 2 * 3
    for record, line in zip(records, said, strict=True):
        assert {name: record[name] for name in line} == line
        assert record["prefill_ms"] > 0
        if record["method"] == "unpruned":
            assert record["kept"] is record["kept_hash"] is None
            continue
        last = record["kept"][-1]["indices"]
        assert len(last) == record["tokens_per_layer"][-1]
        assert 0 < record["flops"] < record["flops_full"]
        assert record["flops"] / record["flops_full"] == pytest.approx(record["flops_share"], rel=1e-6)
    assert json.loads(table.schema.metadata[b"run"])["limit"] == 3
    hashes = {row.name: row.kept_hash for row in read_rows(whole / "rows.jsonl")}
    assert hashes.pop("unpruned") is None
    assert len(set(hashes.values())) == 4


def test_recorded_sets_are_kept_again(folder: Path, whole: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, f"--replay {whole}")
    assert result.exit_code == 0, result.output
    before, after = ({row.name: row for row in read_rows(out / "rows.jsonl")} for out in (whole, tmp_path))
    assert list(after) == ["unpruned", *(f"replay:{name}" for name in before if name != "unpruned")]
    for name, row in before.items():
        if name == "unpruned":
            continue
        again = after[f"replay:{name}"]
        assert again.kept_hash == row.kept_hash
        assert {task: score.accuracy for task, score in again.tasks.items()} == {
            task: score.accuracy for task, score in row.tasks.items()
        }
        assert again.plan["stages"][0]["scorer"]["name"] == row.plan["stages"][0]["scorer"]["name"]  # type: ignore[index]
    kept = [[line["kept_hash"] for line in lines(out / "predictions.jsonl")] for out in (whole, tmp_path)]
    assert kept[0] == kept[1]
    assert kept[0].count(None) == 6
    missing = run(folder, tmp_path, f"--replay {whole} --seeds 5")
    assert missing.exit_code == 2
    assert "is not in the recording" in re.sub(r"\s+", " ", missing.output)


def test_a_model_that_no_family_names_can_be_swept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape is asked of a session, which proves such a model by a dry call; a config alone does not tell it."""
    import vtprune
    from vtprune.errors import UnsupportedModelError

    def unknown(_: object) -> None:
        raise UnsupportedModelError("no family serves it")

    monkeypatch.setattr(vtprune, "geometry", unknown, raising=False)
    result = run(folder, tmp_path, "--methods fastv --keeps 1/4 --tasks vtp_scenes --against uniform")
    assert result.exit_code == 0, result.output
    _, row = read_rows(tmp_path / "rows.jsonl")
    assert row.against is not None
    assert row.flop_counts is not None


# several processes


@pytest.mark.slow
def test_two_processes_say_what_one_says(folder: Path, tmp_path: Path) -> None:
    """Five documents over two processes: one asks three, the other two and one that only fills up."""
    arguments = f"--model {folder} --methods random,fastv --keeps 1/4 --limit 5 --fast --against uniform"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    outs = {1: tmp_path / "one", 2: tmp_path / "two"}
    for count, out in outs.items():
        start = f"{launch} --num_processes {count} -m" if count > 1 else "-m"
        command = [sys.executable, *start.split(), "vtprune", "eval", *arguments.split(), "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Accuracy against token budget") == 1
    one, two = ((out / "predictions.jsonl").read_bytes() for out in outs.values())
    assert one == two
    rows = [{row.name: row for row in read_rows(out / "rows.jsonl")} for out in outs.values()]
    for name, row in rows[0].items():
        assert rows[1][name].tasks == row.tasks
        assert rows[1][name].kept_hash == row.kept_hash
        assert rows[1][name].average_tokens == row.average_tokens
        assert rows[1][name].flops_share == pytest.approx(row.flops_share, rel=0.02)
        assert (rows[1][name].against is None) == (row.against is None)


@pytest.mark.slow
def test_a_process_that_breaks_fails_the_cell_and_not_the_sweep(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from vtprune.eval.lmms_base import LmmsVtprune\n"
        "real = LmmsVtprune.answer\n"
        "def answer(self, *a, **k):\n"
        "    if os.environ['RANK'] == '1' and self.session and 'FastV' in str(self.session.plan):\n"
        "        raise KeyError('rank 1 broke')\n"
        "    return real(self, *a, **k)\n"
        "LmmsVtprune.answer = answer\n"
        "from vtprune.cli import main\n"
        "main()\n"
    )
    script = tmp_path / "broken.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    arguments = f"eval --model {folder} --methods fastv,random --keeps 1/4 --limit 4 --fast --against none"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", str(script), *arguments.split()]
    command += ["--tasks", "vtp_scenes", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    rows = {row.name: row for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert {name: row.status for name, row in rows.items()} == {
        "unpruned": "ok",
        "fastv 1/4": "failed",
        "random 1/4": "ok",
    }
    assert "process 1 broke" in rows["fastv 1/4"].message
    assert "KeyError: 'rank 1 broke'" in rows["fastv 1/4"].message
    assert "FAILED fastv 1/4" in done.stdout


# large models


def test_a_checkpoint_can_be_spread_over_devices(folder: Path, whole: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path, "--device-map auto --methods fastv --keeps 1/4")
    assert result.exit_code == 0, result.output
    expected = {row.name: row for row in read_rows(whole / "rows.jsonl")}
    for row in read_rows(tmp_path / "rows.jsonl"):
        assert row.tasks == expected[row.name].tasks
        assert row.kept_hash == expected[row.name].kept_hash
    refused = CliRunner().invoke(app, ["eval", "--device-map", "auto", "--out", str(tmp_path / "no")])
    assert refused.exit_code == 2
    assert "'tiny:llava' fits one" in re.sub(r"[\s│]+", " ", refused.output)
