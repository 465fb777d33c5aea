"""What scorers see inside towers whose tokens are cells of several patches, and what blocks are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from family_models import CASES, Row
from torch import Tensor
from tower_cases import blocks_of, ragged
from tower_oracle import encoded, gone, tower_masked, tower_of, turned

import vtprune
from vtprune.contract import AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.hooks.alive import Alive
from vtprune.hooks.tower_rows import TowerRows
from vtprune.hooks.units import blocks, raster
from vtprune.kernels.attention_rows import attention_rows

SEEN: list[TokenView] = []


@dataclass(frozen=True)
class Watch(Scorer):
    """Keeps what the query attends to, and shows what it was shown."""

    name: ClassVar[str] = "watch"
    queries: ClassVar[Queries | None] = "cls"

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        weights = attention_rows(view.query, view.key, view.scaling, real=view.real, column=view.column)
        norm = view.visual(view.value).mean(1).abs().sum(-1)
        return {"attention": weights[:, 0], "norm": norm}

    def score(self, view: TokenView) -> Tensor:
        SEEN.append(view)
        return view.memory["attention"]


def by_hand(module: Any, states: Tensor, named: dict[str, Any], patches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[V] attention of the query to each token and [V] L1 norm of its value: means over its patches.

    The query is CLS where there is one (`states` of one picture), else the mean over `patches`, all that are left.
    """
    if hasattr(module, "qkv"):
        query, key, value = turned(module, states, named["position_embeddings"])
        rows = sorted(row for cell in patches for row in cell)
        asked, scaling = query[rows].mean(0), module.scaling
    else:
        split = (len(states), module.num_heads, -1)
        query, key, value = (getattr(module, f"{x}_proj")(states).view(split) for x in "qkv")
        patches = [[1 + row for row in cell] for cell in patches]
        rows = [0, *sorted(row for cell in patches for row in cell)]
        asked, scaling = query[0], module.scale
    weights = torch.zeros(len(states))
    weights[rows] = (torch.einsum("hd,khd->hk", asked, key[rows]) * scaling).softmax(1).mean(0)
    norm = value.mean(1).abs().sum(1)
    return tuple(torch.stack([signal[cell].mean() for cell in patches]) for signal in (weights, norm))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl", "qwen2_5_vl", "glm4v"])
@torch.no_grad()
def test_scorers_see_cells(name: str) -> None:
    """Two cuts, so that the second sees a tower that has shrunk; images differ in size where they can."""
    case = CASES[name]
    rows = ragged(case)
    model, inputs = case.model(), case.batch(*rows)
    stages = tuple(vtprune.Stage(vtprune.Site("vision", k), Watch(), keep) for k, keep in ((0, 0.7), (3, 0.3)))
    SEEN.clear()
    with vtprune.prune(model, vtprune.Plan(stages)) as session:
        model(**inputs)
        report = session.report
    number, lead = blocks_of(case)
    _, modules = tower_of(model)
    calls: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def keep_call(block: int) -> Any:
        def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            calls[block] = (args[0] if args else kwargs["hidden_states"]), kwargs

        return pre

    handles = [m.register_forward_pre_hook(keep_call(i), with_kwargs=True) for i, m in enumerate(modules)]
    lost = gone(case, rows, report, number)
    with tower_masked(model, lost, lead):
        model(**inputs)
    for handle in handles:
        handle.remove()

    sizes = [size for row in rows for _, size in row.media]
    found = encoded(case, "image", sizes, [True] * len(sizes))
    for view, block in zip(SEEN, (0, 3), strict=True):
        states, named = calls[block]
        missing = set(lost["image"][block])
        for unit in range(max(found.units) + 1):
            cells = [
                cell
                for cell, owner in zip(found.tokens, found.units, strict=True)
                if owner == unit and not missing & set(cell)
            ]
            mine = states if hasattr(modules[block], "qkv") else states[unit]
            attention, norm = by_hand(modules[block], mine, named, [[row for _, row in cell] for cell in cells])
            assert int(view.valid[unit].sum()) == len(cells)
            torch.testing.assert_close(view.memory["attention"][unit, : len(cells)], attention, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(view.memory["norm"][unit, : len(cells)], norm, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_views_know_rows_and_columns_of_ragged_pictures() -> None:
    case = CASES["qwen2_5_vl"]
    model, inputs = case.model(), case.batch(*ragged(case))
    stage = vtprune.Stage(vtprune.Site("vision", 1), Watch(), 0.5)
    SEEN.clear()
    with vtprune.prune(model, vtprune.Plan((stage,))):
        model(**inputs)
    (view,) = SEEN
    assert view.grids == (((4, 4),), ((2, 5),), ((3, 3),), ((3, 3),))
    assert view.row[1, :10].tolist() == [0] * 5 + [1] * 5
    assert view.col[1, :10].tolist() == [0, 1, 2, 3, 4] * 2
    assert view.row[2, :9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def rows_of_two() -> tuple[TowerRows, Tensor]:
    """Two pictures, of 4 and 2 cells of 2 patches, of which cells 0 and 3, and 1, are left; states say who they are."""
    rows = TowerRows([blocks(2, 2, 2), blocks(1, 2, 2)], 0, "segments", torch.device("cpu"))
    hidden = torch.arange(12.0)[:, None].expand(-1, 3)
    alive = Alive.all_of([4, 2], torch.device("cpu"))
    kept = torch.tensor([[True, False, False, True], [False, True, False, False]])
    return rows, rows.keep(alive.keep(kept, [2, 1])[0], hidden)


def test_hosts_arguments_are_cut_with_the_rows() -> None:
    rows, hidden = rows_of_two()
    assert hidden[:, 0].tolist() == [0, 1, 6, 7, 10, 11]
    angles = torch.arange(12.0)[:, None]
    windows = torch.tensor([0, 2, 6, 8, 10, 12], dtype=torch.int32)
    given = {
        "cu_seqlens": windows,
        "max_seqlen": 4,
        "cu_seq_lens_q": torch.tensor([0, 8, 12], dtype=torch.int32),
        "max_length_q": 8,
        "position_embeddings": (angles, angles + 100),
        "position_ids": torch.arange(12)[None],
    }
    _, cut = rows.arguments((), given)
    # the second and the fourth window have lost all their rows
    assert cut["cu_seqlens"].tolist() == [0, 2, 4, 6]
    assert cut["cu_seqlens"].dtype == torch.int32
    assert cut["max_seqlen"] == 2
    assert cut["cu_seq_lens_q"].tolist() == [0, 4, 6]
    assert cut["max_length_q"] == 4
    cos, sin = cut["position_embeddings"]
    assert cos[:, 0].tolist() == [0, 1, 6, 7, 10, 11]
    assert torch.equal(sin, cos + 100)
    assert cut["position_ids"].tolist() == [[0, 1, 6, 7, 10, 11]]
    assert rows.pairs(cut) == 3 * 4
    assert torch.equal(rows.full(hidden)[[0, 1, 6, 7, 10, 11]], hidden)
    assert int((rows.full(hidden) != 0).any(1).sum()) == 5  # row 0 holds zeros of its own


def test_a_sequence_without_bounds_is_refused() -> None:
    units = [raster(4, 4, 2), raster(2, 4, 2)]
    rows = TowerRows(units, 0, "mask", torch.device("cpu"))
    alive = Alive.all_of([4, 2], torch.device("cpu"))
    kept = torch.tensor([[True, False, False, True], [False, True, False, False]])
    rows.keep(alive.keep(kept, [2, 1])[0], torch.zeros(1, 24, 3))
    with pytest.raises(vtprune.VtpruneError, match="neither a mask nor cu_seq_lens_q"):
        rows.arguments((None,), {"position_ids": torch.arange(24)[None]})


@torch.no_grad()
def test_pixels_of_another_size_than_the_configs_are_refused() -> None:
    """InternVL's tower takes any size, but the prompt has placeholders for the config's."""
    case = CASES["internvl"]
    model, inputs = case.model(), case.batch(Row((("image", 1),)))
    inputs["pixel_values"] = torch.zeros(1, 3, 64, 64)
    with (
        vtprune.prune(model, "flowcut", 0.5),
        pytest.raises(vtprune.VtpruneError, match="pixels and sizes fit the config"),
    ):
        model(**inputs)
