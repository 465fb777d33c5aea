"""The training loop, its state and its labels: interrupted anywhere, nothing is lost and nothing changes."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from two_processes import CONFIG, HELD_OUT, SAMPLES, TARGETS, Toy, examples, make, run

from vtprune.errors import InputError, VtpruneError
from vtprune.processes import new_accelerator
from vtprune.train.files import DamagedFileError, read_tensors, write_tensors
from vtprune.train.log import LOG_FILE
from vtprune.train.loop import LoopConfig, train_loop
from vtprune.train.processes import my_slice
from vtprune.train.state import STATE_FILE
from vtprune.train.store import label

pytest.importorskip("accelerate")

STEPS = math.ceil(SAMPLES / CONFIG.batch_size)
SCRIPT = Path(__file__).parent / "two_processes.py"


class Interrupted(Exception):
    """Stands for a power cut."""


class Watch:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.titles: list[str] = []
        self.done = 0

    def start(self, title: str, steps: int) -> None:
        self.phases.append((title, steps))
        self.done = 0

    def step(self, title: str, count: int = 1) -> None:
        self.titles.append(title)
        self.done += count


def _log(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG_FILE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _interrupted(toy: Toy, call: int) -> Toy:
    """The toy, whose loss raises at this call."""
    real, calls = toy.loss, []

    def loss(places: Sequence[int]) -> Tensor:
        calls.append(places)
        if len(calls) == call:
            raise Interrupted
        return real(places)

    toy.loss = loss  # type: ignore[method-assign]
    return toy


def _same(one: nn.Module, two: nn.Module) -> bool:
    weights = two.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def test_it_learns_and_says_how(tmp_path: Path) -> None:
    toy, watch = Toy(), Watch()
    result = run(tmp_path, toy, replace(CONFIG, epochs=20), progress=watch)
    assert result.best_loss < 0.2 * result.history[0]["held_out_loss"]
    assert len(result.history) == 21
    assert result.best_loss == min(row["held_out_loss"] for row in result.history)
    assert result.history[result.best_epoch]["held_out_loss"] == result.best_loss
    assert not toy.training
    assert watch.phases == [("training", 20 * STEPS)]
    assert watch.done == 20 * STEPS
    assert watch.titles[1].startswith("epoch 1 of 20, loss ")
    rows = _log(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "lr", "train_loss", "held_out_loss", "held_out_largest"]
    # every second step and every fifth, the end of an epoch
    steps = sorted({0, *range(2, 101, 2), *range(5, 101, 5)})
    assert [int(row["step"]) for row in rows] == steps
    assert [row["held_out_loss"] != "" for row in rows] == [step % 5 == 0 for step in steps]
    assert [int(row["epoch"]) for row in rows if int(row["step"]) in (0, 2, 5, 6, 10)] == [0, 1, 1, 2, 2]


def test_the_best_weights_are_restored(tmp_path: Path) -> None:
    """Held-out losses by script: the weights of epoch 3 come back, and patience ends the run after epoch 6."""
    toy = Toy()
    scripted, seen = iter([9.0, 5.0, 6.0, 4.0, 4.0, 6.0, 4.5, 1.0]), []

    def held_out() -> float:
        seen.append(toy.layers[0].weight.detach().clone())
        return next(scripted)

    config = replace(CONFIG, epochs=7, patience=3)
    result = train_loop(toy, SAMPLES, toy.loss, held_out, config, tmp_path)
    assert (result.best_loss, result.best_epoch, len(result.history)) == (4.0, 3, 7)
    assert torch.equal(toy.layers[0].weight, seen[3])
    assert not torch.equal(seen[3], seen[-1])


def test_training_that_only_hurts_gives_the_untrained_module_back(tmp_path: Path) -> None:
    toy, rising = Toy(), iter(range(9))
    result = train_loop(toy, SAMPLES, toy.loss, lambda: float(next(rising)), replace(CONFIG, patience=2), tmp_path)
    assert (result.best_epoch, result.best_loss, len(result.history)) == (0, 0.0, 3)
    assert _same(toy, Toy())


def test_steps_are_those_of_adamw(tmp_path: Path) -> None:
    """Against the same steps written out: order, learning rates, clipping, decay of matrices alone."""
    config = replace(CONFIG, epochs=2, weight_decay=0.1, max_grad_norm=0.5)
    toy, mine, orders = Toy(), Toy(), []
    real = toy.loss
    toy.loss = lambda places: orders.append(list(places)) or real(places)  # type: ignore[method-assign]
    train_loop(toy, SAMPLES, toy.loss, lambda: -float(len(orders)), config, tmp_path)
    first, second = ([place for batch in orders[start : start + STEPS] for place in batch] for start in (0, STEPS))
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert first != second
    matrices = [p for p in mine.parameters() if p.ndim == 2]
    vectors = [p for p in mine.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups)
    # 10 steps: 2 of warm-up, then a cosine over 8
    rates = [0.025, 0.05] + [0.025 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    for rate, places in zip(rates, orders, strict=True):
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        mine.loss(places).backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        adam.step()
    for name, value in mine.state_dict().items():
        if name != "seen":
            torch.testing.assert_close(toy.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert [row["lr"] for row in _log(tmp_path) if row["step"] == "10"] == [str(rates[-1])]


def test_what_nothing_uses_does_not_decay(tmp_path: Path) -> None:
    toy = Toy()
    run(tmp_path, toy)
    assert torch.equal(toy.unused.weight, Toy().unused.weight)


@pytest.mark.parametrize("save_every", [None, 2])
@pytest.mark.parametrize("call", [1, 5, 6, 8, 3 * STEPS])
def test_an_interrupted_run_ends_like_any_other(tmp_path: Path, call: int, save_every: int | None) -> None:
    config = replace(CONFIG, save_every=save_every)
    whole, broken = Toy(dropout=0.3), Toy(dropout=0.3)
    expected = run(tmp_path / "whole", whole, config)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", _interrupted(broken, call), config)
    resumed, watch = Toy(dropout=0.3), Watch()
    nn.init.ones_(resumed.layers[0].weight)  # type: ignore[arg-type]
    result = run(tmp_path / "broken", resumed, config, progress=watch)
    assert _same(resumed, whole)
    assert result == expected
    assert (tmp_path / "broken" / LOG_FILE).read_bytes() == (tmp_path / "whole" / LOG_FILE).read_bytes()
    one, two = (load_file(tmp_path / name / STATE_FILE) for name in ("whole", "broken"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # nothing but the steps since the last state was run twice
    every = (STEPS,) if save_every is None else (STEPS, save_every)
    stored = max(step for step in range(call) if any(step % one == 0 for one in every))
    assert watch.done == 3 * STEPS
    assert len(watch.titles) - 1 == 3 * STEPS - stored


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    whole = Toy()
    expected = run(tmp_path / "whole", whole)
    for call in (2, 4, 3, 5, 4):
        with pytest.raises(Interrupted):
            run(tmp_path / "broken", _interrupted(Toy(), call))
    resumed = Toy()
    assert run(tmp_path / "broken", resumed) == expected
    assert _same(resumed, whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, again = Toy(), _interrupted(Toy(), 1)
    assert run(tmp_path, first) == run(tmp_path, again)
    assert _same(first, again)


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the second epoch, behind a stored state."""
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "10"], env=_environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / STATE_FILE).is_file()
    whole, resumed, watch = Toy(), Toy(), Watch()
    expected = run(tmp_path / "whole", whole)
    assert run(tmp_path / "run", resumed, progress=watch) == expected
    assert _same(resumed, whole)
    assert len(watch.titles) - 1 == 3 * STEPS - 8
    assert (tmp_path / "run" / LOG_FILE).read_bytes() == (tmp_path / "whole" / LOG_FILE).read_bytes()


def _environment() -> dict[str, str]:
    paths = [str(SCRIPT.parent.parent), str(SCRIPT.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_end_like_one(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, tmp_path]
    done = subprocess.run([str(part) for part in launch], env=_environment(), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    toy, calls = Toy(), []
    real = toy.loss
    toy.loss = lambda places: calls.append(list(places)) or real(places)  # type: ignore[method-assign]
    expected = run(tmp_path / "one", toy)
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    # both run a part of every batch, and nothing twice; the last batch has 3 samples
    halves = [[one + two for one, two in zip(ranks[0]["calls"], ranks[1]["calls"], strict=True)]]
    assert halves == [calls]
    assert {len(one) for one in ranks[1]["calls"]} == {1, 2}
    for rank in ranks:
        for name, value in toy.state_dict().items():
            if name != "seen":
                torch.testing.assert_close(rank["weights"][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
        assert rank["result"].best_loss == pytest.approx(expected.best_loss, rel=1e-5)
        assert torch.equal(rank["weights"]["unused.weight"], toy.unused.weight)
        assert rank["labels"]["number"].tolist() == list(range(7))
        assert [len(row) for row in rank["labels"]["row"]] == list(range(7))
    rows = _log(tmp_path / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in _log(tmp_path / "one")]
    # a run of two processes goes on as one
    assert run(tmp_path / "run", toy) == ranks[0]["result"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_slices_are_even_and_whole(count: int) -> None:
    from types import SimpleNamespace

    slices = [
        my_slice(range(count), SimpleNamespace(num_processes=3, process_index=rank))  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert [item for part in slices for item in part] == list(range(count))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_parts_of_a_batch_change_the_rounding_alone(tmp_path: Path) -> None:
    whole, parts, sizes = Toy(), Toy(), []
    real = parts.loss
    parts.loss = lambda places: sizes.append(len(places)) or real(places)  # type: ignore[method-assign]
    expected = run(tmp_path / "whole", whole)
    result = run(tmp_path / "parts", parts, replace(CONFIG, micro_batch=2))
    assert sizes[:5] == [2, 2, 1, 2, 2]
    assert result.best_loss == pytest.approx(expected.best_loss, rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    results = []
    for name in ("one", "two"):
        toy = Toy(dropout=0.5)
        torch.manual_seed(7)
        results.append(run(tmp_path / name, toy))
        assert torch.equal(torch.rand(3), expected)
        # what is drawn outside makes no difference
        torch.rand(5)
    assert results[0] == results[1]
    assert run(tmp_path / "three", Toy(dropout=0.5), replace(CONFIG, seed=1)) != results[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, lr=0.5)}, r"other settings \(loop.lr 0.05, now 0.5\)"),
        ({"settings": {"model": "other"}}, r"model 'tiny', now 'other'"),
        ({"train_size": 9}, "train_size 23, now 9"),
    ],
)
def test_a_run_with_other_settings_is_left_alone(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def start(config: LoopConfig = CONFIG, settings: dict[str, str] | None = None, train_size: int = SAMPLES) -> object:
        toy = Toy()
        return train_loop(
            toy, train_size, toy.loss, toy.held_out, config, tmp_path, settings=settings or {"model": "tiny"}
        )

    result = start()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        start(**change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {STATE_FILE, LOG_FILE}
    assert start() == result


def test_another_module_is_another_setting(tmp_path: Path) -> None:
    run(tmp_path, Toy())
    other = Toy()
    other.unused = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"module.shapes.unused.weight \[2, 2\], now \[2, 3\]"):
        run(tmp_path, other)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_state_is_refused_and_kept(tmp_path: Path, damage: str) -> None:
    run(tmp_path, Toy())
    path = tmp_path / STATE_FILE
    content = path.read_bytes()
    bad = {"cut": content[:-100], "flip": content[:-50] + b"\x55" + content[-49:], "empty": b""}.get(damage)
    if bad is None:
        write_tensors(path, {"other": torch.zeros(2)}, {"made": "elsewhere"})
        bad = path.read_bytes()
    path.write_bytes(bad)
    toy = Toy()
    with pytest.raises(DamagedFileError, match="Move it away to start anew"):
        run(tmp_path, toy)
    assert path.read_bytes() == bad
    assert _same(toy, Toy())


def test_a_state_that_is_cut_off_while_it_is_written_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Toy()
    expected = run(tmp_path / "whole", whole)
    real, calls = Path.replace, []

    def replace_path(self: Path, target: Path) -> Path:
        calls.append(target)
        if target.name == STATE_FILE and len(calls) == 6:
            self.write_bytes(self.read_bytes()[:40])
            raise Interrupted
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_path)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", Toy())
    monkeypatch.undo()
    resumed = Toy()
    assert run(tmp_path / "broken", resumed) == expected
    assert _same(resumed, whole)


def test_a_row_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    run(tmp_path / "whole", Toy())
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", _interrupted(Toy(), 8))
    with (tmp_path / "broken" / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write("1")
    run(tmp_path / "broken", Toy())
    assert (tmp_path / "broken" / LOG_FILE).read_bytes() == (tmp_path / "whole" / LOG_FILE).read_bytes()


def test_losses_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    toy = Toy()
    with pytest.raises(VtpruneError, match="training loss of step 1 is nan"):
        train_loop(toy, SAMPLES, lambda places: toy.loss(places) * math.nan, toy.held_out, CONFIG, tmp_path / "a")
    for held_out, message in ((lambda: math.nan, "finite loss"), (lambda: {"accuracy": 1.0}, "one called 'loss'")):
        with pytest.raises(VtpruneError, match=message):
            train_loop(toy, SAMPLES, toy.loss, held_out, CONFIG, tmp_path / "b")


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    toy = Toy()
    with pytest.raises(InputError, match="at least one sample, got 0"):
        train_loop(toy, 0, toy.loss, toy.held_out, CONFIG, tmp_path)
    with pytest.raises(InputError, match="Toy has no parameter that requires gradients"):
        run(tmp_path, toy.requires_grad_(False))


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    toy = Toy()
    toy.layers[0].requires_grad_(False)
    run(tmp_path, toy)
    assert torch.equal(toy.layers[0].weight, Toy().layers[0].weight)
    assert not torch.equal(toy.layers[3].weight, Toy().layers[3].weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an int >= 1, got 2.0"),
        ({"lr": 0}, "lr must be a number above 0, got 0"),
        ({"lr": math.inf}, "lr must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"warmup": 1.5}, r"warmup must be a share in \[0, 1\], got 1.5"),
        ({"patience": 0}, "patience must be an int >= 1, or None"),
        ({"seed": -1}, "seed must be an int >= 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be"),
        ({"micro_batch": 0}, "micro_batch must be"),
        ({"save_every": True}, "save_every must be"),
        ({"log_every": 0}, "log_every must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoopConfig(**settings)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_learning_rates_rise_and_fall(warmup: float) -> None:
    config = LoopConfig(lr=2.0, warmup=warmup)
    rates = [config.lr_at(step, 10) for step in range(10)]
    top = max(0, round(warmup * 10) - 1)
    assert rates[top] == max(rates) == 2.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_accelerate_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(VtpruneError, match=r"this needs accelerate.*pip install 'vtprune\[train\]'"):
        new_accelerator("train")


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tensors = {
        "a": base.view(2, 3).T,
        "b": base[:2],
        "scalar": torch.tensor(3, dtype=torch.int64),
        "half": base.to(torch.bfloat16),
        "mask": base > 2,
        "empty": torch.zeros(0, 4),
    }
    note = {"z": 1, "a": {"x": [1.5, None]}}
    write_tensors(tmp_path / "deep" / "file", tensors, note)
    read, found = read_tensors(tmp_path / "deep" / "file")
    assert list(found) == ["z", "a"]
    assert found == note
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def _numbers(labels: Any) -> list[int]:
    return labels["number"].tolist()


def test_labels_are_computed_once(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    watch = Watch()

    def counted(batch: list[Any]) -> dict[str, Any]:
        asked.append([example.key for example in batch])
        if len(asked) == 3:
            raise Interrupted
        return make(batch)

    with pytest.raises(Interrupted):
        label(examples(7), 2, counted, tmp_path)
    labels = label(examples(7), 2, counted, tmp_path, progress=watch)
    assert asked == [["0", "1"], ["2", "3"], ["4", "5"], ["4", "5"], ["6"]]
    assert _numbers(labels) == list(range(7))
    assert [row.tolist() for row in labels["row"]] == [[1.0] * number for number in range(7)]
    assert (watch.phases, watch.done) == ([("labelling", 4)], 4)
    assert _numbers(label(examples(7), 2, _never, tmp_path)) == list(range(7))


def _never(batch: list[Any]) -> dict[str, Any]:
    raise Interrupted


def test_labels_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    label(examples(4), 2, make, tmp_path, settings={"model": "one"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = label(
        examples(4), 2, lambda batch: {"number": torch.zeros(len(batch))}, tmp_path, settings={"model": "two"}
    )
    assert _numbers(other) == [0, 0, 0, 0]
    with pytest.raises(Interrupted):
        label(examples(5)[1:], 2, _never, tmp_path, settings={"model": "one"})
    # more examples keep the whole batches of fewer ones
    longer = label(
        examples(5),
        2,
        lambda batch: make(batch) if len(batch) == 1 else _never(batch),
        tmp_path,
        settings={"model": "one"},
    )
    assert _numbers(longer) == list(range(5))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:-3] + b"abc"])
def test_damaged_labels_are_computed_anew(tmp_path: Path, damage: Any) -> None:
    label(examples(4), 2, make, tmp_path)
    path = sorted(tmp_path.iterdir())[1]
    path.write_bytes(damage(path.read_bytes()))
    asked: list[str] = []
    labels = label(examples(4), 2, lambda batch: asked.append(batch[0].key) or make(batch), tmp_path)
    assert asked == ["2"]
    assert _numbers(labels) == list(range(4))
    assert _numbers(label(examples(4), 2, _never, tmp_path)) == list(range(4))


def test_labels_may_need_gradients(tmp_path: Path) -> None:
    weight = torch.ones((), requires_grad=True)

    def slopes(batch: list[Any]) -> dict[str, Tensor]:
        values = weight * torch.tensor([float(example.key) for example in batch])
        return {
            "slope": torch.stack([torch.autograd.grad(v, weight, retain_graph=True)[0] for v in values]),
            "v": values,
        }

    labels = label(examples(3), 2, slopes, tmp_path)
    assert isinstance(labels["slope"], Tensor)
    assert labels["slope"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda batch: {"a": torch.zeros(3)}, "'a' has 3 rows for 2 examples"),
        (lambda batch: {"a": [torch.zeros(3)]}, "'a' has 1 rows for 2 examples"),
        (lambda batch: {f"a{batch[0].key}": torch.zeros(2)}, r"differ in their labels \(a0, a2\)"),
        (
            lambda batch: {"a": torch.zeros(2) if batch[0].key == "0" else [torch.zeros(1)] * 2},
            "differ in their labels",
        ),
        (lambda batch: {"a": torch.zeros(2, 1 + int(batch[0].key))}, r"shapes \[\(1,\), \(3,\)\]; return a list"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, made: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        label(examples(4), 2, made, tmp_path)


def test_what_cannot_be_labelled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs examples and a batch size >= 1, got 0 and 2"):
        label([], 2, make, tmp_path)
    with pytest.raises(InputError, match="got 2 and 0"):
        label(examples(2), 0, make, tmp_path)
    with pytest.raises(InputError, match="'0' occurs twice"):
        label([*examples(2), *examples(1)], 2, make, tmp_path)


def test_the_toy_has_held_out_samples() -> None:
    assert len(TARGETS) == SAMPLES + HELD_OUT
