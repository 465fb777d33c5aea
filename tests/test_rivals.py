"""`vtprune bench --against`: other libraries, played by small packages of the same interface."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rival_fakes import FILES, KVPRESS, VERSIONS
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune.bench import measured
from vtprune.bench.rivals import RIVALS, rival_rows
from vtprune.bench.runner import BenchConfig, run_bench
from vtprune.bench.table import bench_markdown, break_even, rival_lines
from vtprune.errors import UnknownNameError
from vtprune.presets import build_random, random_inputs

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package of that name and version where it is found; gone after the test."""

    def put(name: str, version: str | None = None, **sources: str) -> None:
        home = tmp_path / name
        for path, text in (sources or FILES[name]).items():
            file = home / name / (f"{path}.py" if sources else path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        version = version or VERSIONS[name]
        meta = home / f"{name}-{version}.dist-info" / "METADATA"
        meta.parent.mkdir()
        meta.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(home))

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in FILES]:
            del sys.modules[name]

    forget()
    yield put
    forget()


def _rows(name: str, preset: str, keeps: tuple[float, ...] = (0.5, 4), batch: int = 1) -> list[dict[str, Any]]:
    model = build_random(preset)
    return rival_rows(RIVALS[name], model, random_inputs(model, batch, 12), keeps, 2, 2)


@pytest.mark.parametrize(
    ("name", "preset", "more", "flops"),
    [("kvpress", "mini", 0, 1.0), ("sparsevlm", "mini-qwen2.5", 1, 1.0), ("angelslim", "mini", 0, None)],
)
def test_a_library_that_works_is_timed_in_turn_with_the_unpruned_model(
    name: str, preset: str, more: int, flops: float | None, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 visual and 12 text tokens; `more` rows are in the cache once the first token is out."""
    install(name)
    together: list[list[str]] = []
    real = measured.interleaved_medians

    def noting(runs: Any, *args: Any, **kwargs: Any) -> Any:
        together.append(list(runs))
        return real(runs, *args, **kwargs)

    monkeypatch.setattr(measured, "interleaved_medians", noting)
    rows = _rows(name, preset, (1.0, 0.5, 4))
    assert together == [["unpruned", "0.5", "4"]] * 2
    json.dumps(rows)
    assert [(row["keep"], row["kept_tokens"]) for row in rows] == [(0.5, 8), (4, 4)]
    for row in rows:
        assert row["possible"] is True
        assert row["proved"] is False
        assert row["rival"]["version"] == VERSIONS[name]
        assert row["kv_bytes"] / row["kv_bytes_full"] == (12 + row["kept_tokens"] + more) / 28
        assert row["total_ratio"] == pytest.approx(row["total_ms"] / row["total_ms_full"])
        assert 0.0 < row["tower_ms"] < row["total_ms"]
        assert 0.0 < row["prefill_ms"] < row["total_ms"]
        assert row["decode_ms"] > 0.0
        assert row["peak_bytes"] > 0
        assert row["prefill_flop_ratio"] == flops


@pytest.mark.parametrize(
    ("name", "preset"), [("kvpress", "mini"), ("sparsevlm", "mini-qwen2.5"), ("angelslim", "mini")]
)
def test_model_and_process_are_left_as_they_were(
    name: str,
    preset: str,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(name)
    model = build_random(preset)
    inputs = random_inputs(model, 1, 12)

    def state() -> tuple[Any, ...]:
        hooks = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
        level = logging.getLogger("kvpress").level
        return hooks, level, dict(ALL_ATTENTION_FUNCTIONS.items()), model.config._attn_implementation

    before, shared = state(), AttentionInterface._global_mapping["sdpa"]
    assert rival_rows(RIVALS[name], model, inputs, (0.5,), 1, 1)[0]["possible"] is True
    assert state() == before
    # what somebody registers later is seen
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", print)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print is not shared
    assert capsys.readouterr().out == ""


def test_a_library_that_is_missing_is_skipped_with_what_installs_it() -> None:
    missing = dataclasses.replace(RIVALS["kvpress"], name="no_such_library")
    model = build_random("mini")
    (row,) = rival_rows(missing, model, random_inputs(model, 1, 12), (0.5,), 1, 1)
    assert row["possible"] is False
    assert row["rival"]["version"] is None
    assert row["reason"].startswith("skipped: not installed: pip install --no-deps 'kvpress>=0.5.5,<0.6'")


@pytest.mark.parametrize("version", ["0.4.9", "0.6.0"])
def test_a_version_that_does_not_fit_is_not_even_imported(version: str, install: Install) -> None:
    install("kvpress", version, __init__="raise RuntimeError('imported')")
    (row,) = _rows("kvpress", "mini")
    assert f"version {version} is installed, the bench drives >=0.5.5,<0.6: pip install" in row["reason"]


def test_a_source_tree_without_metadata_is_taken(install: Install, tmp_path: Path) -> None:
    install("angelslim")
    (meta,) = (tmp_path / "angelslim").glob("*.dist-info")
    (meta / "METADATA").unlink()
    meta.rmdir()
    rows = _rows("angelslim", "mini")
    assert [(row["possible"], row["rival"]["version"]) for row in rows] == [(True, "unknown")] * 2
    assert rival_lines([{"kind": "rival", "method": "angelslim", **rows[0]}])[0].startswith("angelslim *: prunes at")


@pytest.mark.parametrize(
    ("name", "preset", "batch", "reason"),
    [
        ("sparsevlm", "mini", 1, "it serves Qwen2-VL and Qwen2.5-VL, not llava"),
        ("sparsevlm", "mini-qwen2.5", 2, "it runs batches of 1, not of 2"),
        ("angelslim", "mini-internvl", 1, "it serves LLaVA-1.5 and Qwen2.5-VL, not internvl"),
        ("angelslim", "mini", 3, "it runs batches of 1, not of 3"),
    ],
)
def test_models_and_batches_that_it_does_not_serve_are_skipped(
    name: str, preset: str, batch: int, reason: str, install: Install
) -> None:
    install(name)
    (row,) = _rows(name, preset, batch=batch)
    assert row["reason"] == f"skipped: {reason}"


def test_what_kvpress_and_angelslim_do_not_serve_inside_a_family_is_skipped(install: Install) -> None:
    for name, changes, reason in (
        ("kvpress", {"layer_types": ["sliding_attention"] * 4}, "the model has sliding windows"),
        (
            "angelslim",
            {"model_type": "mistral"},
            "LLaVA of a Llama and a CLIP tower, not of mistral and clip_vision_model",
        ),
    ):
        install(name)
        model = build_random("mini")
        for key, value in changes.items():
            setattr(model.config.text_config, key, value)
        (row,) = rival_rows(RIVALS[name], model, random_inputs(model, 1, 12), (0.5,), 1, 1)
        assert reason in row["reason"]


def test_padded_batches_are_skipped(install: Install) -> None:
    install("kvpress")
    model = build_random("mini")
    inputs = random_inputs(model, 2, 12)
    inputs["attention_mask"][0, :2] = 0
    (row,) = rival_rows(RIVALS["kvpress"], model, inputs, (0.5,), 1, 1)
    assert row["reason"] == "skipped: the samples differ in length, and it knows no padding"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import no_such_part",
            "not complete, ModuleNotFoundError: No module named 'no_such_part'. To install it: ",
        ),
        (
            "from torch import no_such_name",
            f"{transformers.__version__} with ImportError: cannot import name 'no_such_name' from 'torch'",
        ),
        (
            "class SnapKVPress:\n    def __init__(self, **kwargs): raise KeyError('cache_position')",
            "KeyError: 'cache_position'",
        ),
    ],
)
def test_what_it_raises_is_told(source: str, reason: str, install: Install) -> None:
    install("kvpress", __init__=source)
    rows = _rows("kvpress", "mini")
    assert [row["keep"] for row in rows] == [0.5, 4]
    assert all(row["possible"] is False and reason in row["reason"] for row in rows)
    assert not any("/torch/" in row["reason"] for row in rows)


def test_wheels_of_angelslim_say_what_they_lack(install: Install) -> None:
    install("angelslim", __init__="")
    assert (
        "this angelslim is without angelslim.compressor, as its wheels are" in _rows("angelslim", "mini")[0]["reason"]
    )


def test_one_budget_that_fails_leaves_the_others(install: Install) -> None:
    install("kvpress")
    good, bad = _rows("kvpress", "mini", (0.5, 17))
    assert (good["keep"], good["possible"]) == (0.5, True)
    assert (bad["keep"], bad["reason"]) == (17, "skipped: 17 visual tokens are to be kept, and the prompt has 16")


def test_what_fails_only_while_it_is_timed_is_told_once(install: Install) -> None:
    late = KVPRESS.replace("    def cut(", "    calls = 0\n\n    def cut(")
    fails = "        SnapKVPress.calls += 1\n        if self.calls > 20:\n            raise RuntimeError('late')\n"
    late = late.replace("        n = int", f"{fails}        n = int")
    install("kvpress", __init__=late)
    (row,) = _rows("kvpress", "mini")
    assert row["keep"] is None
    assert "RuntimeError: late" in row["reason"]


def test_unknown_libraries_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from vtprune import loading
    from vtprune.cli import app

    with pytest.raises(UnknownNameError, match=r"Unknown library 'kvpres'. Did you mean 'kvpress'\?"):
        BenchConfig(("fastv",), (), against=("kvpres",))
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    result = CliRunner().invoke(app, ["bench", "--model", "random:mini", "--against", "sparsevlm,kvpres"])
    assert result.exit_code != 0
    assert "Unknown library 'kvpres'" in " ".join(result.output.split())


def test_bench_command_lists_them_behind_the_methods(install: Install, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vtprune.cli import app

    install("kvpress")
    install("sparsevlm")
    out, table, plot = tmp_path / "bench.jsonl", tmp_path / "bench.md", tmp_path / "bench.png"
    args = ["bench", "--model", "random:mini", "--methods", "uniform", "--keeps", "1/2", "--rounds", "1"]
    args += ["--decode-steps", "1", "--text-tokens", "9", "--images", "1,2", "--against", "kvpress, sparsevlm"]
    result = CliRunner().invoke(app, [*args, "--out", str(out), "--table", str(table), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    half = [
        ("bench", "uniform", 1.0),
        ("bench", "uniform", 0.5),
        ("rival", "kvpress", 0.5),
        ("rival", "sparsevlm", None),
    ]
    assert [(row["kind"], row["method"], row["keep"]) for row in rows] == half * 2
    assert {row["model"] for row in rows} == {"random:mini"}
    assert [row["prompt"]["visual_tokens"] for row in rows] == [16] * 4 + [32] * 4
    text = " ".join(result.output.split())
    assert "kvpress 0.5.5 *: KV cache compression after the prefill" in text
    assert "sparsevlm 0.1.3 *: skipped: it serves Qwen2-VL and Qwen2.5-VL, not llava." in text
    shown = table.read_text(encoding="utf-8")
    kv = f"{rows[2]['kv_bytes'] / rows[2]['kv_bytes_full']:.2f} |\n"
    (line,) = [line for line in shown.splitlines(keepends=True) if line.startswith("| kvpress") and "1/2" in line][:1]
    assert line.startswith("| kvpress 0.5.5 \\* | 1/2 | ")
    assert " | 1.00 | not proved | |" in line
    assert line.endswith(kv)
    assert "| sparsevlm 0.1.3 \\* | | skipped | |" in shown
    assert "Every row was first proved" in shown
    assert shown.count("\nkvpress 0.5.5 \\*: KV cache compression after the prefill") == 1
    assert plot.is_file()


def test_break_even_and_markdown_pass_over_other_libraries(install: Install) -> None:
    install("kvpress")
    model = build_random("mini")
    config = BenchConfig(("uniform",), (0.5,), rounds=1, decode_steps=1, against=("kvpress",))
    told: list[str] = []
    rows = list(run_bench(model, random_inputs(model, 1, 12), config, told.append))
    assert set(told) == {"uniform", "kvpress"}
    assert [row["kind"] for row in rows] == ["bench", "bench", "rival"]
    longer = [{**row, "total_ratio": 2.0, "prompt": {"visual_tokens": 32, "text_tokens": 12}} for row in rows]
    slow = [{**row, "total_ratio": 2.0} for row in rows] + longer
    assert [line.split(" at ")[0] for line in break_even(slow)] == ["uniform"]
    # text of ours alone, if there is nothing else
    assert "\\*" not in bench_markdown(rows[:2])
    assert torch.is_grad_enabled()
