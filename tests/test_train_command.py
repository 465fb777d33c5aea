"""`vtprune train` from the shell: what it writes, says and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.contract import METHODS
from vtprune.errors import InputError, PlanError, UnknownNameError
from vtprune.train.methods import TRAINERS, read_trainer

RUNNER = CliRunner()
FEW = ["--samples", "6", "--held-out-samples", "4", "--epochs", "1", "--batch-size", "3"]


@pytest.mark.parametrize(
    "method", ["dyvte(width=2, layers_per_example=2)", "atp(width=2, target=0.4)", "relevance(channels=(2, 3))"]
)
def test_trains_says_how_to_use_it_and_goes_on(tmp_path: Path, method: str) -> None:
    out = tmp_path / "weights"
    command = ["train", method, "--data", "scenes", "--out", str(out), "--weights", "float16", *FEW]
    first = RUNNER.invoke(app, command)
    assert first.exit_code == 0, first.output
    name = method.partition("(")[0]
    assert f"{name} for tiny:llava: 6 questions, 4 held out" in first.output
    assert f"vtprune run --method \"{name}(weights='{out}')\"" in first.output
    assert json.loads((out / "config.json").read_text())["vtprune_predictor"] == name
    log = (out / "run" / "log.csv").read_text()
    assert log.splitlines()[0].startswith("step,epoch,lr,train_loss,held_out_loss")
    weights = (out / "model.safetensors").read_bytes()
    again = RUNNER.invoke(app, command)
    assert again.exit_code == 0, again.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "run" / "log.csv").read_text() == log, "a finished run was trained again"
    model, _ = vtprune.load_tiny("llava")
    keep = None if METHODS[name].adaptive else 0.5
    with vtprune.prune(model, f"{name}(weights='{out}')", keep):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fastv"], "Unknown learned method 'fastv'"),
        (["dyvte(depth=3)"], "the trainer of dyvte has the settings"),
        (["dyvte(width='a')"], "width must be an int"),
        (["atp", "--data", "nothing"], "Unknown data 'nothing'"),
        (["atp", "--model", "random:llama-0.3b"], "has no processor"),
        (["atp", "--weights", "int8"], "--weights must be float32 or float16"),
        (["atp", "--lr", "0"], "lr must be a number above 0"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    arguments = arguments if "--model" not in arguments else [*arguments[:-1], "random:mini"]
    result = RUNNER.invoke(app, ["train", *arguments, "--out", str(tmp_path / "out"), *FEW])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_settings_of_every_trainer_can_be_written() -> None:
    for name in TRAINERS:
        found, trainer, config = read_trainer(name, {"epochs": 7})
        assert (found, trainer, config.loop.epochs) == (name, TRAINERS[name], 7)
        assert vtprune.methods()[name]
    assert read_trainer("atp(after=[1, 3])", {})[2].after == (1, 3)
    with pytest.raises(PlanError, match="written 'name' or"):
        read_trainer("atp(3)", {})
    with pytest.raises(InputError, match="wrong type"):
        read_trainer("dyvte(ratio='x')", {})
    with pytest.raises(UnknownNameError, match="Did you mean 'dyvte'"):
        read_trainer("dyvt", {})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dyvte(width=2, layers_per_example=3, label_batch=2)", "atp(width=2, target=0.4)"])
def test_two_processes_end_like_one(tmp_path: Path, method: str) -> None:
    """The command as `accelerate launch` starts it: labels and batches are shared out, the weights are the same."""
    options = ["train", method, "--data", "scenes", *FEW]
    one = RUNNER.invoke(app, [*options, "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "vtprune"]
    done = subprocess.run(
        [*launch, *options, "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("6 questions, 4 held out") == 1, "both processes talk"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-4, rtol=1e-3)
