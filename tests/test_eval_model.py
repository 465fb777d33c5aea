"""The lmms-eval model and the sweep on a tiny random model: answers, counts, batches, failures, files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import eval_helpers
import models
import pytest
import torch
from eval_helpers import untimed
from typer.testing import CliRunner

from vtprune.bench.measure import shared_copy
from vtprune.cli import app
from vtprune.errors import InputError, SessionError, UnknownNameError
from vtprune.eval import TASKS_DIR, task_data
from vtprune.eval.asking import attach_to, cut_answer, generation_arguments
from vtprune.eval.harness import Harness, Sample
from vtprune.eval.prefill import prefill_timings

if TYPE_CHECKING:
    from vtprune.eval.lmms_model import VtpruneChat


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    yield from eval_helpers.few_images(5)


def make_chat(*args, **options) -> VtpruneChat:
    from vtprune.eval.lmms_model import VtpruneChat

    return VtpruneChat(*args, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_helpers.save_askable(tmp_path_factory.mktemp("askable"))


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness(eval_helpers.TASKS, limit=5)


@pytest.fixture
def chat(folder: Path) -> VtpruneChat:
    from vtprune.loading import load_model

    return make_chat(loaded=load_model(str(folder)), batch_size=4)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predictions(samples: dict[str, list[Sample]]) -> list[str]:
    return [sample.prediction for task in sorted(samples) for sample in samples[task]]


def test_answers_are_those_of_the_bare_model_one_by_one(chat: VtpruneChat, harness: Harness) -> None:
    expected = []
    for task in sorted(eval_helpers.TASKS):
        for text, images in harness.prompts(chat, task, 5):
            inputs = chat.processor(text=[text], images=images, return_tensors="pt")
            output = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            expected.append(chat.tokenizer.decode(new, skip_special_tokens=True).strip())
    samples = harness.run(chat)
    assert predictions(samples) == expected
    assert len(set(expected)) > 3
    assert all(sample.kind for sample in samples["vtp_scenes"])
    # the caller's model is still there for the next cell
    assert predictions(harness.run(chat)) == expected


def test_a_run_begins_where_it_is_told_to(chat: VtpruneChat, harness: Harness) -> None:
    """Portions of one list of questions, one behind the other, are the questions themselves."""
    whole = harness.run(chat)
    part = Harness(eval_helpers.TASKS, limit=2)
    for task in eval_helpers.TASKS:
        assert untimed(part.run(chat, first=2)[task]) == untimed(whole[task][2:4])
    assert set(part.sizes) == set(eval_helpers.TASKS)
    assert all(size > 5 for size in part.sizes.values())
    assert Harness(eval_helpers.TASKS, 1, split="dev").run(chat)["vtp_scenes"][0].image_id.startswith("dev-")


def test_pruned_answers_do_not_depend_on_the_batch(folder: Path, chat: VtpruneChat, harness: Harness) -> None:
    full = predictions(harness.run(chat))
    chat.attach("random", 0.25)
    batched = harness.run(chat)
    chat.detach()
    alone = make_chat(str(folder), method="random", keep=0.25, batch_size="1", device="cpu")
    one_by_one = harness.run(alone)
    assert predictions(batched) == predictions(one_by_one) != full
    for task, samples in batched.items():
        for mine, its in zip(samples, one_by_one[task], strict=True):
            assert mine.counts["kept_hash"] == its.counts["kept_hash"]
            assert mine.counts["visual_tokens"] == models.TOKENS
            assert mine.counts["average_tokens"] == models.TOKENS / 4
            assert mine.counts["tokens_per_layer"] == [models.TOKENS // 4] * models.LAYERS


def test_totals_are_the_shares_of_the_reports(chat: VtpruneChat, harness: Harness) -> None:
    chat.attach("uniform", 8)
    chat.save_kept = True
    samples = harness.run(chat)
    totals = chat.totals
    assert totals.questions == 10
    assert totals.to_dict()["average_tokens"] == 8
    assert 0 < totals.share("flops") < 1
    # text stays, so the cache shrinks by less than the visual tokens
    assert 0.5 < totals.share("kv_bytes") < 1
    prompts = [sample.counts["input_tokens"] for task in samples.values() for sample in task]
    assert totals.share("kv_bytes") >= 1 - 8 / min(prompts)
    kept = samples["vtp_scenes"][0].counts["kept"]
    assert [record["site"] for record in kept] == [str(stage.site) for stage in chat.session.plan.stages]
    assert len(kept[-1]["indices"]) == 8


def test_errors_are_raised_not_scored(chat: VtpruneChat, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("out of memory at batch 2")

    monkeypatch.setattr(chat.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory at batch 2"):
        harness.run(chat)


def test_model_arguments_as_lmms_eval_parses_them(folder: Path) -> None:
    from lmms_eval.utils import simple_parse_args_string

    text = f"pretrained={folder},method=fastv,keep=0.5,basis=final,dtype=float32,attn_implementation=eager"
    model = make_chat(**simple_parse_args_string(text), batch_size="3", max_batch_size=None)
    assert model.batch_size == 3
    assert model.session.plan.stages[-1].count(models.TOKENS) == models.TOKENS // 2
    assert model.model.config._attn_implementation == "eager"
    model.clean()
    assert not hasattr(model, "_model")
    for keep, survivors in (("8", 8), ("1.0", 16), ("25%", 4)):
        arguments = simple_parse_args_string(f"method=uniform,keep={keep}")
        bare = models.llava()
        session = attach_to(bare, str(arguments["method"]), arguments["keep"])
        bare(**models.batch(models.Row()))
        assert session.report.average_tokens == (survivors,)


@pytest.mark.parametrize(
    ("method", "keep"), [("uniform@1/2+fastv", "0.25"), ("uniform+fastv", "1/2+0.25"), ("uniform@1/2+fastv@25%", None)]
)
def test_model_arguments_spell_chains(method: str, keep: str | None) -> None:
    with attach_to(models.llava(), method, keep) as session:
        counts = [(stage.scorer.name, stage.count(models.TOKENS)) for stage in session.plan.stages]
    # one layer sees 8 tokens and three see 3: nearest to 4
    assert counts == [("uniform", 8), ("fastv", 3)]


def test_bad_model_arguments_are_named(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'kep'\. Did you mean 'keep'"):
        make_chat(str(folder), kep=0.5)
    with pytest.raises(InputError, match="'auto'"):
        make_chat(str(folder), batch_size="auto")
    with pytest.raises(NotImplementedError, match="generate_until tasks only"):
        make_chat(str(folder)).loglikelihood([])


def test_generation_settings_and_stop_strings() -> None:
    greedy = generation_arguments({"max_new_tokens": 4, "temperature": 0, "do_sample": False})
    assert (greedy["max_new_tokens"], greedy["do_sample"], greedy["temperature"]) == (4, False, None)
    assert generation_arguments({"temperature": 0.7, "top_p": 0.9})["do_sample"] is True
    assert cut_answer("red star\n\nuser:", ["\n\n"]) == "red star"
    assert cut_answer(" red ", None) == "red"


def test_unknown_tasks_and_limits_are_named() -> None:
    with pytest.raises(InputError, match="Unknown task 'vtp_scene'"):
        Harness(["vtp_scene"], limit=1)
    with pytest.raises(InputError, match="got 0"):
        Harness(["vtp_scenes"], limit=0)


def test_replicas_share_weights_and_sessions_do_not_meet() -> None:
    model = models.llava()
    twin = shared_copy(model)
    assert twin is not model
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with attach_to(model, "random", 0.25), attach_to(twin, "uniform", 0.5):
        pass
    inputs = models.batch(models.Row())
    before = model(**inputs).logits
    timings = prefill_timings(model, inputs, {"u": lambda twin: attach_to(twin, "uniform", 0.25)}, rounds=2)
    assert set(timings) == {"none", "u"}
    assert all(len(timing.times_s) == 2 and timing.median_s > 0 for timing in timings.values())
    assert torch.equal(model(**inputs).logits, before)


def test_sweep_isolates_a_broken_cell(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.eval.lmms_model import VtpruneChat

    original = VtpruneChat.attach

    def attach(self: VtpruneChat, method, keep=None, **options):
        if method == "pool" and keep == 0.5:
            raise SessionError("pool broke")
        return original(self, method, keep, **options)

    monkeypatch.setattr(VtpruneChat, "attach", attach)
    out = tmp_path / "out"
    arguments = f"eval --model {folder} --methods uniform,pool,fastv --keeps 1,1/2,1/16 --limit 3 --fast --out {out}"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 1, result.output
    assert "FAILED pool 1/2: " in result.output
    assert "pool broke" in result.output
    rows = {(row["method"], row["keep"]): row for row in read_lines(out / "rows.jsonl")}
    assert len(rows) == 7
    assert rows["pool", "1/2"]["status"] == "failed"
    assert rows["fastv", "1/16"]["status"] == "not possible"
    assert rows["fastv", "1/16"]["floor"] > 1
    ran = rows["uniform", "1/16"]
    assert ran["status"] == "ok"
    assert ran["average_tokens"] == 1.0
    assert ran["prefill_ratio"] > 0
    assert ran["plan"]["stages"][0]["scorer"]["name"] == "uniform"
    assert ran["run"]["versions"]["lmms-eval"].startswith("0.7.")
    assert rows["unpruned", "1"]["flops_share"] == 1.0
    lines = read_lines(out / "predictions.jsonl")
    assert len(lines) == (1 + 2 + 1 + 1) * 2 * 3
    assert {line["kept_hash"] is None for line in lines if line["method"] == "unpruned"} == {True}
    for name in ("accuracy.png", "report.html", "table.md"):
        assert (out / name).stat().st_size > 500


def test_several_models_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data, "IMAGES", 2)
    models = ("tiny:qwen2_vl", "tiny:internvl")
    arguments = ["--model", ",".join(models), "--methods", "uniform", "--keeps", "1/4", "--limit", "3"]
    arguments += ["--tasks", "vtp_scenes", "--fast", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.output
    for model, name in zip(models, ("tiny-qwen2_vl", "tiny-internvl"), strict=True):
        rows = read_lines(tmp_path / name / "rows.jsonl")
        assert [row["run"]["model"] for row in rows] == [model, model]
        assert [row["average_tokens"] for row in rows] == [81.0, 20.0]
        assert model in result.output
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_misspelt_model_costs_the_others_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--model", "tiny:llava,tiny:lava", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "Did you mean 'llava'" in re.sub(r"\s+", " ", result.output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("--methods fastvv", "Unknown method 'fastvv'"),
        ("--methods ,", "at least one method"),
        ("--methods flowcut+fastv", "got 'flowcut+fastv', where 2 of 'flowcut', 'fastv' have none"),
        ("--against fastv", "pool, random, uniform, uniform-frames, vidcom2) or none, got 'fastv'"),
        ("--basis mean", "got 'mean'"),
        ("--keeps 3/2", "'3/2'"),
        ("--model random:mini", "has no processor"),
        ("--model ,", "at least one model"),
    ],
)
def test_bad_options_end_with_a_message(arguments: str, match: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path), *arguments.split()])
    assert result.exit_code == 2
    assert match in re.sub(r"\s+", " ", result.output)


@pytest.mark.slow
@pytest.mark.parametrize("slot", [[], ["--force_simple"]], ids=["chat", "simple"])
def test_plain_lmms_eval_agrees_with_the_sweep(slot: list[str], tmp_path: Path) -> None:
    """`python -m lmms_eval --model vtprune` through the entry point; it exits 0 even when it fails."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "vtprune", "--batch_size", "8", "--limit", "12"]
    command += ["--model_args", "pretrained=tiny:llava,method=uniform,keep=0.25", *slot]
    command += ["--tasks", "vtp_easy_vqa,vtp_scenes", "--include_path", str(TASKS_DIR)]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    files = sorted(tmp_path.rglob("*_results.json"))
    assert len(files) == 1, done.stdout + done.stderr
    results = json.loads(files[0].read_text())["results"]

    from vtprune.loading import load_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_data, "IMAGES", 250)
        harness = Harness(("vtp_easy_vqa", "vtp_scenes"), limit=12)
    model = make_chat(loaded=load_model("tiny:llava"), method="uniform", keep=0.25, batch_size=8)
    for task, samples in harness.run(model).items():
        accuracy = sum(sample.score for sample in samples) / len(samples)
        assert accuracy > 0
        assert results[task]["acc,none"] == pytest.approx(accuracy)
        logged = [line for path in tmp_path.rglob(f"*_samples_{task}.jsonl") for line in read_lines(path)]
        hashes = {line["doc_id"]: line["token_counts"][0]["kept_hash"] for line in logged}
        assert hashes == {sample.doc_id: sample.counts["kept_hash"] for sample in samples}
