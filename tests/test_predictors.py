"""Checkpoints of predictors: the hub's form, the model they belong to, and nothing that runs code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from models import llava
from safetensors.torch import load_file

from vtprune.errors import CheckpointError
from vtprune.predictors import ExitGates, Fingerprint, Thresholds, load_predictor, shipped_weights

MODEL = Fingerprint("LlavaForConditionalGeneration", 3, 4, "abcdef0123", (0.5, -1.0))


def gates() -> ExitGates:
    torch.manual_seed(3)
    return ExitGates(MODEL.to_dict(), 3, 4, width=5)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    mine = gates()
    mine.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vtprune_predictor"], config["width"], config["fingerprint"]["layers"]) == ("dyvte", 5, 3)
    for again in (ExitGates.from_pretrained(tmp_path), load_predictor(ExitGates, str(tmp_path))):
        assert again.fingerprint == MODEL
        assert not again.training
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), again.parameters(), strict=True))


def test_stored_in_half_precision_and_loaded_in_full(tmp_path: Path) -> None:
    gates().half().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    again = load_predictor(ExitGates, str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again is load_predictor(ExitGates, str(tmp_path)), "read from disk at every call"


def test_a_folder_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    gates().save_pretrained(tmp_path)
    first = load_predictor(ExitGates, str(tmp_path))
    other = gates()
    torch.nn.init.zeros_(other.up[0].weight)
    other.save_pretrained(tmp_path)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert not torch.equal(load_predictor(ExitGates, str(tmp_path)).up[0].weight, first.up[0].weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "does not hold the weights of 'dyvte'"),
        ("kind", "holds weights of 'atp', expected those of 'dyvte'"),
        ("config", "cannot be read from"),
        ("missing config", "holds no config.json of a predictor"),
        ("pickle only", "does not hold the weights of 'dyvte'"),
        ("other shape", "does not hold the weights of 'dyvte'"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "gates"
    gates().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:40])
    elif damage == "kind":
        Thresholds(MODEL.to_dict(), after=[0], width=2).save_pretrained(folder)
    elif damage == "config":
        config.write_text("{")
    elif damage == "missing config":
        config.unlink()
    elif damage == "pickle only":
        # a file that would run code if anybody opened it
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Boom()))
        weights.unlink()
    else:
        known = json.loads(config.read_text())
        config.write_text(json.dumps({**known, "width": 7}))
    with pytest.raises(CheckpointError, match=message):
        load_predictor(ExitGates, str(folder))


class _Boom:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def test_a_name_that_is_neither_folder_nor_repository() -> None:
    for name in ("nowhere", "/no/such/folder", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"got '{name}', which is neither"):
            load_predictor(ExitGates, name)


def test_fingerprints_tell_models_apart() -> None:
    assert MODEL.differences(MODEL) == []
    assert Fingerprint.from_dict(json.loads(json.dumps(MODEL.to_dict()))) == MODEL
    near = Fingerprint(MODEL.architecture, 3, 4, None, (0.504, -1.004))
    assert MODEL.differences(near) == [], "bf16 rounds, and an unknown revision says nothing"
    other = Fingerprint("Other", 5, 6, "fedcba9876", (0.6, -1.0))
    assert MODEL.differences(other) == [
        "architecture 'LlavaForConditionalGeneration' and 'Other'",
        "layers 3 and 5",
        "hidden 4 and 6",
        "revision abcdef01 and fedcba98",
        "the weights themselves",
    ]


def test_fingerprint_of_a_model() -> None:
    model = llava()
    mine = Fingerprint.of(model)
    assert (mine.architecture, mine.layers, mine.hidden) == ("LlavaForConditionalGeneration", 4, 64)
    assert len(set(mine.values)) == 16
    assert mine.differences(Fingerprint.of(llava().bfloat16())) == []
    model.resize_token_embeddings(140)
    assert mine.differences(Fingerprint.of(model)) == [], "words were added at the end"
    assert Fingerprint.of(model.to("meta")).values == ()
    assert shipped_weights("dyvte", mine) is None
