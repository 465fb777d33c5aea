"""The signals that scorers get are the model's own: attention rows against its attention maps, written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import IMAGE, Row, batch, llava
from torch import Tensor
from transformers import AttentionInterface

import vtprune
from vtprune.contract import AttentionView, Memory, Scorer, TokenView
from vtprune.kernels.attention_rows import attention_rows

ROWS = (Row(1, 3, 5, 0), Row(2, 1, 4, 1), Row(0, 2, 9, 2), Row(1, 6, 2, 3))
SEEN: list[AttentionView] = []


@dataclass(frozen=True)
class Spy(Scorer):
    """Notes every view it is shown and keeps the first tokens."""

    name: ClassVar[str] = "spy"
    queries: ClassVar[str] = "cls"
    accumulates: ClassVar[bool] = True

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        SEEN.append(view)
        return {"count": memory.get("count", torch.zeros(view.valid.shape)) + 1}

    def score(self, view: TokenView) -> Tensor:
        return -view.original.float()


@dataclass(frozen=True)
class Uneven(Spy):
    """Keeps another number of tokens of each image."""

    def count(self, view: TokenView) -> Tensor:
        return view.keep + 3 * torch.arange(len(view.keep))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_fastv_scores_are_the_last_prompt_tokens_attention(layer: int, left: bool) -> None:
    model, inputs = llava("eager"), batch(*ROWS, left=left)
    maps = model(**inputs, output_attentions=True).attentions[layer - 1].mean(1)
    with vtprune.prune(model, vtprune.FastV(layer=layer), 0.6, record_scores=True) as session:
        model(**inputs)
        scores = session.report.kept[0].scores
    assert scores is not None
    for b, mask in enumerate(inputs["attention_mask"]):
        last = int(mask.nonzero()[-1, 0])
        visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0]
        torch.testing.assert_close(scores[b], maps[b, last, visual], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_tower_rows_are_those_of_the_cls_token(attention: str) -> None:
    inputs = batch(ROWS[0], ROWS[1])
    maps = llava("eager").model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    model = llava(attention)
    SEEN.clear()
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("vision", 3), Spy(), 5),))
    with vtprune.prune(model, plan):
        model.get_image_features(inputs["pixel_values"])
    assert [view.block for view in SEEN] == [0, 1, 2, 3]
    for view in SEEN:
        assert view.has_cls
        rows = attention_rows(view.query, view.key, view.scaling, real=view.real, column=view.column)
        torch.testing.assert_close(rows[:, 0], maps[view.block].mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(view.query_value, view.value[:, :, :1])


@torch.no_grad()
def test_a_tower_without_cls_gives_the_mean_query() -> None:
    inputs, model = batch(ROWS[0]), llava(tower="siglip")
    SEEN.clear()
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("vision", 1), Spy(), 5),))
    states = {}
    attention = model.model.vision_tower.encoder.layers[1].self_attn
    handle = attention.register_forward_pre_hook(lambda m, a, k: states.update(k), with_kwargs=True)
    with vtprune.prune(model, plan):
        model.get_image_features(inputs["pixel_values"])
    handle.remove()
    hidden = states["hidden_states"]
    view = SEEN[1]
    assert not view.has_cls
    for states_of, projection in ((view.query, attention.q_proj), (view.query_value, attention.v_proj)):
        want = projection(hidden).view(1, 16, 4, 8).mean(1)
        torch.testing.assert_close(states_of[:, :, 0], want, atol=1e-6, rtol=1e-5)
    assert view.column.tolist() == [list(range(16))]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_padding_of_a_ragged_tower_is_marked(tower: str) -> None:
    inputs, model = batch(ROWS[0], ROWS[3], Row(1, seed=7)), llava(tower=tower)
    stages = (
        vtprune.Stage(vtprune.Site("vision", 1), Uneven(), 4, adaptive=True),
        vtprune.Stage(vtprune.Site("vision", 3), Spy(), 2),
    )
    SEEN.clear()
    with vtprune.prune(model, vtprune.Plan(stages)):
        model.get_image_features(inputs["pixel_values"])
    first, last = SEEN[1], SEEN[3]
    assert first.real is None
    assert last.real is not None
    assert last.valid.sum(1).tolist() == [4, 7, 10]
    assert last.real.sum(1).tolist() == [n + (tower == "clip") for n in (4, 7, 10)]
    rows = attention_rows(last.query, last.key, last.scaling, real=last.real)
    assert not rows[:, 0][~last.real].any()
    # the mean query leaves padding out as well
    alone = last.value[0, :, : int(last.real[0].sum())]
    want = alone[:, :1] if tower == "clip" else alone.mean(1, keepdim=True)
    torch.testing.assert_close(last.query_value[0], want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_backend_sees_the_users_config_and_other_threads_still_see_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a backend runs, a second thread that calls the same module must still be observed."""
    model, inputs = llava("sdpa"), batch(ROWS[0])
    attention = model.model.language_model.layers[0].self_attn
    users, sdpa, seen = attention.config, AttentionInterface._global_mapping["sdpa"], []

    def backend(module: torch.nn.Module, *args: Tensor, **kwargs: object) -> object:
        if getattr(module, "layer_idx", None) == 0:
            seen.append((module.config is users, attention.config is users))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", backend)
    with vtprune.prune(model, "fastv", 0.5):
        model(**inputs)
    assert seen == [(True, False)]
    assert attention.config is users
