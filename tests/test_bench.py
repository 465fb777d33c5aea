"""Timing on callables with known behaviour, and the whole bench on a preset of toy size."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, Row

import vtprune
from vtprune.bench import timing
from vtprune.bench.measure import BareDecoder, Decoder, Prefill, Started, cache_bytes, peak_bytes, shared_copy
from vtprune.bench.plot import plot_bench
from vtprune.bench.rows import warnings_of
from vtprune.bench.runner import BenchConfig, run_bench
from vtprune.bench.table import bench_markdown, bench_table, break_even
from vtprune.bench.timing import interleaved_medians, summarise
from vtprune.errors import BudgetError, InputError, UnsupportedModelError
from vtprune.presets import PRESETS, build_random, preset_config, random_inputs


class _Clock:
    """A clock that only the callables move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float) -> Any:
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(timing, "timer", clock)
    return clock


def test_median_and_percentiles_leave_the_warm_up_out(clock: _Clock) -> None:
    result = interleaved_medians({"a": clock.run("a", 100.0, 5.0, 1.0, 2.0, 3.0, 4.0)}, rounds=5, warmup=1)["a"]
    assert result.median_s == 3.0
    assert (result.p20_s, result.p80_s) == pytest.approx((1.8, 4.2))
    assert result.times_s == (5.0, 1.0, 2.0, 3.0, 4.0)


def test_callables_take_turns_and_every_second_round_is_reversed(clock: _Clock) -> None:
    runs = {name: clock.run(name, *[1.0] * 4) for name in "abc"}
    told: list[str] = []
    interleaved_medians(runs, rounds=3, warmup=1, progress=told.append)
    assert clock.calls == list("cba" + "abc" + "cba" + "abc")
    assert told == clock.calls


def test_drift_hits_all_alike(clock: _Clock) -> None:
    # a machine that gets twice as slow half way through
    runs = {"a": clock.run("a", 1, 1, 1, 2, 2, 2, 2), "b": clock.run("b", 1, 1, 1, 2, 2, 2, 2)}
    result = interleaved_medians(runs, rounds=7, warmup=0)
    assert result["a"].median_s == result["b"].median_s == 2


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (3, -1)])
def test_bad_rounds_are_refused(rounds: int, warmup: int) -> None:
    with pytest.raises(InputError, match=f"got rounds={rounds}, warmup={warmup}"):
        interleaved_medians({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_nothing_to_summarise() -> None:
    with pytest.raises(InputError, match="0 timings"):
        summarise([])


def test_peak_bytes_is_exact_on_the_cpu() -> None:
    def run() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        del first
        second = torch.empty(3000, dtype=torch.float32)
        third = torch.empty(2000, dtype=torch.float32)
        del second, third
        torch.empty(4000, dtype=torch.float32)

    assert peak_bytes(run, torch.device("cpu")) == 20_000


def test_peak_bytes_names_a_device_it_cannot_measure() -> None:
    with pytest.raises(InputError, match="got 'meta'"):
        peak_bytes(lambda: None, torch.device("meta"))


def test_cache_bytes_counts_what_a_view_keeps_alive() -> None:
    class Layer:
        keys = torch.zeros(1, 2, 10, 4)[:, :, :5]
        values = torch.zeros(1, 2, 5, 4)

    class Cache:
        layers = (Layer(),)

    assert cache_bytes(Cache()) == ((40 + 40) * 4, (80 + 40) * 4)


def test_shared_copy_shares_weights_and_nothing_else() -> None:
    model = build_random("mini")
    twin = shared_copy(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert model.config is not twin.config


def test_prefill_refuses_a_model_without_image_features() -> None:
    class Plain(torch.nn.Module):
        base_model = torch.nn.Linear(1, 1)

    with pytest.raises(UnsupportedModelError, match="Plain has no get_image_features"):
        Prefill(Plain(), {})


def test_decoding_goes_on_behind_a_cache_of_fewer_rows_at_the_position_of_the_prompt() -> None:
    model = build_random("mini")
    inputs = random_inputs(model, 2, 12)
    with torch.no_grad():
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    started = Started(out.past_key_values, out.logits[:, -1:].argmax(-1))
    plain = Decoder(model, inputs, 3)()
    assert torch.equal(Decoder(model, inputs, 3, lambda: started)(), plain)
    for layer in started.past_key_values.layers:
        layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
    decoder = Decoder(model, inputs, 2, lambda: started)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    decoder()
    assert [call["attention_mask"].tolist() for call in seen] == [[[1] * n] * 2 for n in (11, 12)]
    assert [call["position_ids"].tolist() for call in seen] == [[[n]] * 2 for n in (28, 29)]


def _rows(name: str = "mini", **changes: Any) -> list[dict[str, Any]]:
    model = build_random(name)
    config = BenchConfig(**{"methods": ("fastv",), "keeps": (0.5,), "rounds": 2, "decode_steps": 2, **changes})
    return list(run_bench(model, random_inputs(model, config.batch_size, text_tokens=12), config))


def test_bench_rows_are_complete_and_serialise() -> None:
    rows = _rows(batch_size=2)
    assert [(row["method"], row["keep"]) for row in rows] == [("fastv", 1.0), ("fastv", 0.5)]
    json.dumps(rows)
    whole, half = rows
    assert whole["identical"] is True
    assert whole["prefill_flop_ratio"] == 1.0
    assert whole["kv_bytes"] == whole["kv_bytes_full"]
    assert half["kv_bytes"] == half["kv_bytes_counted"] < half["kv_bytes_full"]
    assert half["average_tokens"] == pytest.approx([8.0, 8.0], abs=1.0)
    assert half["prefill_flops"] < half["prefill_flops_full"]
    assert half["prefill_quotient"] == pytest.approx(half["prefill_flop_ratio"] / half["prefill_ratio"])
    assert half["prefill_ms"] < half["total_ms"]
    assert half["plan"]["stages"]
    assert half["device"]["name"]
    assert half["versions"]["torch"] == torch.__version__
    assert half["threads"] == torch.get_num_threads()
    assert half["config"]["seed"] == 0


def test_the_bare_decoder_runs_every_length_once_and_averages_over_the_layers(
    clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which n rows take 10 + n seconds: half the rows are worth less than half the time."""
    model = build_random("mini")
    bare = BareDecoder(shared_copy(model), batch=2, length=40, rounds=1)
    seen: list[tuple[int, ...]] = []

    def run(*, inputs_embeds: torch.Tensor, use_cache: bool) -> None:
        seen.append(tuple(inputs_embeds.shape))
        clock.now += 10 + inputs_embeds.shape[1]

    monkeypatch.setattr(bare, "_decoder", run)
    assert bare.ratio([40, 40, 20, 20]) == pytest.approx((1 + 30 / 50) / 2)
    assert sorted(set(seen)) == [(2, 20, 64), (2, 40, 64)]
    seen.clear()
    assert bare.ratio([20] * 4) == pytest.approx(0.6)
    assert not seen, "measured before"
    # a first pass of two layers on 30 rows, and a quarter of a layer on 20
    assert bare.ratio([20] * 4, [(30, 2.0), (20, 0.25)]) == pytest.approx((4 * 0.6 + 2 * 0.8 + 0.25 * 0.6) / 4)


def test_bare_rows_are_those_of_the_longest_sample() -> None:
    rows = _rows(batch_size=2, keeps=(0.5,))
    assert rows[0]["bare_ratio"] == 1.0
    assert rows[1]["bare_quotient"] == pytest.approx(rows[1]["prefill_flop_ratio"] / rows[1]["bare_ratio"])


@pytest.mark.parametrize(
    ("method", "keep", "name"),
    [
        ("gemfilter(layer=1)", 0.6, "mini"),
        ('gemfilter(layer=1,tokens="any")', 0.6, "mini"),
        ("transprune", 0.95, "mini"),
        # an example image of its config has other counts than this prompt
        ("transprune", 0.95, "mini-qwen2.5"),
        ("gemfilter(layer=1)", 0.6, "mini-qwen2.5"),
    ],
)
def test_what_is_only_asked_counts_for_the_bare_decoder_too(
    method: str, keep: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose time is the FLOPs the bare quotient is 1."""
    from vtprune.bench import runner
    from vtprune.cost import prefill_flops

    shape = vtprune.geometry(build_random(name))

    class Ideal(BareDecoder):
        def __init__(self, model: Any, batch: int, length: int, rounds: int) -> None:
            full = prefill_flops(shape, [length])
            self._shares = {n: prefill_flops(shape, [n]) / full for n in range(1, length + 1)}

    monkeypatch.setattr(runner, "BareDecoder", Ideal)
    row = _rows(name, batch_size=2, methods=(method,), keeps=(keep,))[-1]
    assert row["prefill_flop_ratio"] != 1.0
    assert row["bare_quotient"] == pytest.approx(1.0, rel=1e-9)


def test_a_cell_that_is_not_the_masked_oracle_is_not_measured() -> None:
    """A layer that mixes rows whatever the mask says: pruning cannot be exact there, and no time is shown for it."""
    model = build_random("mini")
    layer = model.model.language_model.layers[2]
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(1, keepdim=True))
    config = BenchConfig(("uniform",), (0.5,), rounds=1, decode_steps=1)
    whole, half = run_bench(model, random_inputs(model, 1, 12), config)
    assert whole["identical"] is True
    assert half["possible"] is False
    assert half["exact"] is False
    assert "differs from the unpruned model with the same tokens hidden by" in half["reason"]
    assert "prefill_ms" not in half


def test_rows_tell_how_exact_they_are_and_what_scoring_takes() -> None:
    whole, half = _rows(methods=("fastv",), batch_size=2)
    assert whole["oracle_error"] is None
    assert half["oracle_error"] < 1e-5 < half["oracle_control"]
    assert whole["scoring_ms"] == 0.0
    assert 0.0 < half["scoring_ms"] < half["total_ms"]
    assert half["scoring_share"] == pytest.approx(half["scoring_ms"] / half["total_ms"])
    assert 0.0 < half["tower_ms"] < half["total_ms"]
    assert half["prompt"] == {"visual_tokens": 16, "text_tokens": 12}
    assert half["warnings"] == [w for w in half["warnings"] if not w.startswith("not proved")]


def test_a_model_that_the_oracle_does_not_serve_is_measured_and_says_so() -> None:
    case = CASES["gemma3"]
    inputs = case.batch(Row((("image", case.sizes[0]),), 3, 9, 0))
    _, half = run_bench(case.model(), inputs, BenchConfig(("uniform",), (0.5,), rounds=1, decode_steps=1))
    assert half["possible"] is True
    assert any(w.startswith("not proved: ") and "sliding windows" in w for w in half["warnings"])


def _point(visual: int, ratio: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "bench", "possible": True, "keep": 0.25, "method": "fastv", "total_ratio": ratio}
    return {**row, "config": {"batch_size": 1}, "prompt": {"visual_tokens": visual, "text_tokens": 64}, **more}


def test_break_even_is_the_first_length_behind_the_last_slow_one() -> None:
    rows = [_point(64, 1.3), _point(128, 0.9), _point(256, 1.1), _point(512, 0.7), _point(1024, 0.4)]
    where = "fastv at keep 0.25, batch 1, 64 text tokens: "
    assert break_even(rows) == [f"{where}pays from 512 visual tokens on (slower at 256)"]
    assert break_even(rows[:3]) == [f"{where}pays at none of the lengths measured (slower at 256)"]
    assert break_even(rows[3:]) == []
    assert break_even(rows[:1]) == []
    # the overhead of being attached is no budget
    assert break_even([{**row, "keep": 1.0} for row in rows]) == []


def test_plot_has_a_line_a_method_and_the_cost_of_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    model = build_random("mini")
    rows: list[dict[str, Any]] = []
    for images in (1, 2):
        config = BenchConfig(("uniform", "fastv"), (0.5,), images=images, rounds=1, decode_steps=1)
        rows += run_bench(model, random_inputs(model, 1, 12, images), config)
    plot_bench(rows, tmp_path / "both.png")
    plot_bench([row for row in rows if row["config"]["images"] == 1], tmp_path / "one.png")
    assert [len(figure.axes) for figure in drawn] == [2, 1]
    speed, cost = drawn[0].axes
    lines = {line.get_label(): line for line in speed.get_lines()}
    assert {"FLOP-ideal", "uniform", "fastv"} <= set(lines)
    half = next(row for row in rows if row["method"] == "fastv" and row["keep"] == 0.5)
    assert lines["fastv"].get_xydata().tolist() == [[half["total_flop_ratio"], 1 / half["total_ratio"]]]
    lengths = {line.get_label(): line.get_xdata() for line in cost.get_lines()}
    assert list(lengths) == ["unpruned", "uniform 0.5", "fastv 0.5"]
    assert all(list(x) == [16, 32] for x in lengths.values())


@pytest.mark.parametrize(
    ("name", "tokens"), [("mini", 16), ("mini-next", 88), ("mini-qwen2.5", 16), ("mini-internvl", 32)]
)
def test_presets_of_each_family_run_and_are_pruned_exactly(name: str, tokens: int) -> None:
    model = build_random(name)
    inputs = random_inputs(model, 2, 12, images=2)
    assert inputs["input_ids"].shape == (2, 12 + 2 * tokens)
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == 2 * tokens).all()
    result = vtprune.verify(model, inputs, "flowcut", 0.5)
    assert result.exact
    assert result.report.visual_tokens == (2 * tokens,) * 2


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "tokens"),
    [
        ("llava-1.5-7b", 32, 4096, 576),
        ("llava-next-7b", 32, 4096, 2928),
        ("qwen2.5-vl-3b", 36, 2048, 576),
        ("qwen2.5-vl-7b", 28, 3584, 576),
        ("internvl3-2b", 28, 1536, 1280),
    ],
)
def test_presets_have_the_geometry_of_their_checkpoints(name: str, layers: int, hidden: int, tokens: int) -> None:
    shape = vtprune.geometry(preset_config(name))
    assert (shape.layers, shape.hidden) == (layers, hidden)
    assert vtprune.geometry(preset_config(f"{name}:layers=3")).layers == 3
    assert PRESETS[name].pictures(1, torch.Generator()).tokens == tokens


def test_sliding_caches_are_no_mismatch() -> None:
    """After a prompt the host's sliding layers hold views, unpruned as pruned."""
    case = CASES["gemma3"]
    inputs = case.batch(*[Row((("image", case.sizes[0]),), 3, 9, seed) for seed in range(2)])
    config = BenchConfig(methods=("uniform",), keeps=(0.5,), rounds=1, decode_steps=1)
    whole, half = run_bench(case.model(), inputs, config)
    assert half["kv_bytes"] == half["kv_bytes_counted"] < half["kv_bytes_full"] == whole["kv_bytes"]
    assert half["kv_bytes_alive_full"] > half["kv_bytes_full"]
    assert not [w for w in (*whole["warnings"], *half["warnings"]) if "counted" in w]


def test_views_in_the_cache_are_told_and_are_no_mismatch() -> None:
    row = {"keep": 0.5, "total_ratio": 0.5, "peak_bytes": 1, "peak_bytes_full": 2, "kv_bytes": 10, "kv_bytes_full": 20}
    row |= {"kv_bytes_counted": 10, "kv_bytes_alive": 10, "kv_bytes_alive_full": 20}
    assert warnings_of(row) == []
    assert warnings_of({**row, "kv_bytes_counted": 9}) == ["the cache holds 10 bytes, counted were 9"]
    assert warnings_of({**row, "kv_bytes_alive": 15}) == [
        "the cache keeps 1.50 x its bytes alive behind views, unpruned 1.00 x"
    ]


def test_a_chain_is_timed_like_a_method() -> None:
    whole, quarter = _rows(methods=("divprune@1/2+fastv(layer=2)",), keeps=(0.25,))
    assert whole["identical"] is True
    assert whole["average_tokens"] == [16.0]
    assert [stage["scorer"]["name"] for stage in quarter["plan"]["stages"]] == ["divprune", "fastv"]
    assert quarter["average_tokens"] == [4.5]
    assert quarter["method"] == "divprune@1/2+fastv(layer=2)"


def test_methods_that_decide_have_one_cell_and_untrained_ones_say_so() -> None:
    model = build_random("mini")
    inputs = random_inputs(model, text_tokens=9)
    rows = list(run_bench(model, inputs, BenchConfig(("dyvte(exit_layer=1)", "dyvte"), (0.5, 0.25), rounds=1)))
    whole, own, missing = rows
    assert (whole["keep"], own["keep"], missing["keep"]) == (1.0, None, None)
    assert own["oracle_error"] < 1e-5
    assert own["average_tokens"] == [own["visual_tokens"][0] * 2 / 4]
    assert (missing["possible"], missing["status"]) == (False, "not trained")
    assert "has no weights for this model" in missing["reason"]
    text = bench_markdown(rows)
    assert "| dyvte(exit_layer=1) | own | " in text
    assert "| dyvte | own | not trained | |" in text
    bench_table(rows)


def test_bench_says_what_a_schedule_cannot_reach(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = _rows(keeps=(1,))
    assert rows[-1]["possible"] is False
    assert rows[-1]["floor"] > 1
    Console(width=200).print(bench_table(rows))
    assert f"not possible (floor {rows[-1]['floor']:.4g})" in capsys.readouterr().out
    assert f"| fastv | 1 | not possible (floor {rows[-1]['floor']:.4g}) |" in bench_markdown(rows)


def test_bench_refuses_a_method_that_changes_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vtprune.prune

    def broken(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1e-3)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(vtprune, "prune", broken)
    (row,) = _rows()
    assert row["possible"] is False
    assert row["identical"] is False
    assert "differ from the unpruned model" in row["reason"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "at least one method"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"methods": ("divprune+fastv",)}, "exactly one method of a chain takes the row's budget"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, BudgetError), match=message):
        BenchConfig(**{"methods": ("fastv",), "keeps": (), **changes})


def test_random_inputs_are_seeded_and_leave_the_global_state() -> None:
    state = torch.random.get_rng_state()
    model = build_random("mini", seed=3)
    one, two, other = (random_inputs(model, 2, 9, images=2, seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert one["input_ids"].shape == (2, 9 + 2 * 16)
    assert ((one["input_ids"] == model.config.image_token_id).sum(1) == 32).all()
    assert one["pixel_values"].shape[0] == 4
    again = build_random("mini", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_random_inputs_refuse_an_empty_batch() -> None:
    model = build_random("mini")
    with pytest.raises(InputError, match="batch=0"):
        random_inputs(model, batch=0)
    with pytest.raises(InputError, match="text_tokens > images, got batch=1, images=4, text_tokens=4"):
        random_inputs(model, text_tokens=4, images=4)
    with pytest.raises(InputError, match="LlavaForConditionalGeneration was not made by build_random"):
        random_inputs(CASES["llava"].model())


def test_bench_command_measures_all_combinations_and_plots(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vtprune.cli import app

    out, plot = tmp_path / "bench.jsonl", tmp_path / "deep" / "bench.png"
    args = ["bench", "--model", "random:mini", "--methods", "uniform", "--keeps", "1/2", "--rounds", "1"]
    args += ["--decode-steps", "1", "--batch-size", "1,2", "--text-tokens", "9", "--images", "1,2"]
    table = tmp_path / "deep" / "table.md"
    result = CliRunner().invoke(app, [*args, "--out", str(out), "--plot", str(plot), "--table", str(table)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    shapes = [(r["config"]["batch_size"], r["prompt"]["text_tokens"], r["prompt"]["visual_tokens"]) for r in rows[::2]]
    assert shapes == [(b, 9, 16 * n) for n in (1, 2) for b in (1, 2)]
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = table.read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in written.splitlines()[0]
    assert written.count("| method | keep |") == 4
    whole, half = [line.split(" | ") for line in written.splitlines() if line.startswith("| uniform")][:2]
    assert (whole[1], whole[4]) == ("all", "identical")
    assert (half[1], half[3], half[4]) == (
        "1/2",
        f"{rows[1]['prefill_flop_ratio']:.2f}",
        f"{rows[1]['prefill_quotient']:.2f}",
    )
    assert "batch 2, 32 visual and 9 text tokens a sample" in " ".join(result.output.split())
    for option, text in (("--batch-size", "0"), ("--images", "1,x")):
        bad = CliRunner().invoke(app, [*args, option, text])
        assert f"{option} must be numbers >= 1, separated by commas, got {text!r}" in " ".join(bad.output.split())
    bad = CliRunner().invoke(app, ["bench", "--model", "tiny:llava", "--images", "1,2"])
    assert "make prompts for random models; tiny:llava is asked its example question" in " ".join(bad.output.split())


def test_bench_command_writes_rows(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vtprune.cli import app

    out = tmp_path / "deep" / "bench.jsonl"
    args = ["bench", "--model", "random:mini", "--methods", "random@1/2+uniform", "--keeps", "1/2", "--rounds", "1"]
    before = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, [*args, "--decode-steps", "1", "--threads", "2", "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["keep"] for row in rows] == [1.0, 0.5]
    assert {row["model"] for row in rows} == {"random:mini"}
    assert {row["threads"] for row in rows} == {2}
    assert "unpruned" in result.output


def test_rows_name_the_commit_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.bench import provenance

    package = tmp_path / "vtprune" / "bench"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    # installed, not cloned
    assert provenance.source_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    commit = provenance.source_commit()
    assert commit
    assert found.startswith(commit)
    (tmp_path / "file").write_text("a", encoding="utf-8")
    subprocess.run([*git, "add", "file"], check=True)
    assert provenance.source_commit() == f"{commit}-dirty"
    assert provenance.provenance(torch.device("cpu"))["commit"] == f"{commit}-dirty"
