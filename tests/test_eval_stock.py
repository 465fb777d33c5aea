"""lmms-eval's own model classes with pruning: found by name, same answers as ours, errors raised."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eval_helpers
import pytest

from vtprune.errors import UnknownNameError, VtpruneError
from vtprune.eval import lmms_manifest
from vtprune.eval.harness import Harness, quiet
from vtprune.loading import load_model


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    yield from eval_helpers.few_images(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_helpers.save_askable(tmp_path_factory.mktemp("askable"))


def make(name: str, folder: Path, **arguments: Any) -> Any:
    from vtprune.eval import stock_models

    with quiet():
        return getattr(stock_models, name)(pretrained=str(folder), dtype="float32", **arguments)


def test_every_family_has_its_class() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from vtprune.eval import stock_models

    registry = ModelRegistryV2()
    ours = {manifest.model_id: manifest for manifest in lmms_manifest.manifests()}
    assert set(ours) == {
        "vtprune",
        "vtprune_llava_hf",
        "vtprune_qwen2_vl",
        "vtprune_qwen2_5_vl",
        "vtprune_internvl_hf",
    }
    for name, manifest in ours.items():
        registry.register_manifest(manifest)
        for path in filter(None, (manifest.chat_class_path, manifest.simple_class_path)):
            found = registry.get_model_class(name, force_simple=path == manifest.simple_class_path)
            assert f"{found.__module__}.{found.__name__}" == path
            assert found.is_simple is (path == manifest.simple_class_path)
    assert "decord" not in sys.modules
    with pytest.raises(AttributeError, match="LlavaChat"):
        _ = stock_models.LlavaChat


def test_the_stock_class_says_what_ours_says(folder: Path) -> None:
    from vtprune.eval.lmms_model import VtpruneChat

    harness = Harness(["vtp_scenes"], limit=5)
    ours = VtpruneChat(loaded=load_model(str(folder), dtype="float32"), batch_size=1)
    said = {}
    for method, keep in (("none", None), ("uniform", 0.25)):
        ours.attach(method, keep)
        expected = [sample.prediction for sample in harness.run(ours)["vtp_scenes"]]
        stock = make("LlavaHfChat", folder, method=method, keep=keep)
        assert type(stock).__mro__[2].__module__ == "lmms_eval.models.chat.llava_hf"
        session = stock.session
        said[method] = [sample.prediction for sample in harness.run(stock)["vtp_scenes"]]
        assert said[method] == expected
        if session is not None:
            assert session.report.average_tokens == (4.0,)
    assert said["none"] != said["uniform"]


def test_what_breaks_is_raised_and_not_an_empty_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make("LlavaHfChat", folder, method="random", keep=8)
    model = stock.model

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "generate", broken)
    with pytest.raises(VtpruneError, match="out of memory"):
        Harness(["vtp_scenes"], limit=1).run(stock)
    assert "generate" not in vars(model)


def test_wrong_arguments_are_named(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="fastvv"):
        make("LlavaHfChat", folder, method="fastvv", keep=0.5)
    with pytest.raises(AssertionError, match="Unexpected kwargs"):
        make("LlavaHfChat", folder, kep=0.5)
