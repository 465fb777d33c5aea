"""Layout, report and recorded scores."""

from __future__ import annotations

import json

import pytest
import torch
from models import LAYERS, SIDE, TOKENS, Row, batch, llava

import vtprune
from vtprune.layout import ImageGrid, Layout


def layout_of(row: Row) -> Layout:
    ids = torch.tensor([row.ids()])
    return Layout.from_images(
        ids == 99, torch.ones_like(ids, dtype=torch.bool), [[(ImageGrid(SIDE, SIDE),)] * row.images]
    )


def test_layout_maps_tokens_to_pixels_and_positions() -> None:
    row = Row(2, 3, 5)
    layout = layout_of(row)
    assert layout.counts == (2 * TOKENS,)
    assert layout.position[0].tolist() == [i for i, token in enumerate(row.ids()) if token == 99]
    assert layout.box(0, 0) == (0, None, (0.0, 0.0, 0.25, 0.25))
    assert layout.box(0, SIDE + 2) == (0, None, (0.5, 0.25, 0.75, 0.5))
    assert layout.box(0, TOKENS + TOKENS - 1) == (1, None, (0.75, 0.75, 1.0, 1.0))


def test_boxes_tile_each_image() -> None:
    layout = layout_of(Row(2))
    area: dict[int, float] = {}
    for token in range(2 * TOKENS):
        image, _, (left, top, right, bottom) = layout.box(0, token)
        area[image] = area.get(image, 0.0) + (right - left) * (bottom - top)
    assert area == pytest.approx({0: 1.0, 1: 1.0})


@torch.no_grad()
def test_recorded_scores_explain_the_choice() -> None:
    model, inputs = llava(), batch(Row(1, 3, 5, 0), Row(1, 1, 4, 1), Row(0, 2, 9, 2))
    with vtprune.prune(model, "fastv", 0.5, record_scores=True) as session:
        model(**inputs)
        record = session.report.kept[0]
    assert record.scores is not None
    assert record.alive is not None
    assert [len(s) for s in record.scores] == [TOKENS, TOKENS, 0]
    for scores, alive, kept in zip(record.scores[:2], record.alive[:2], record.indices[:2], strict=True):
        assert alive.tolist() == list(range(TOKENS))
        gone = torch.ones(TOKENS, dtype=torch.bool)
        gone[kept] = False
        assert scores[kept].min() >= scores[gone].max()
    with vtprune.prune(model, "fastv", 0.5) as session:
        model(**inputs)
        assert session.report.kept[0].scores is None


@torch.no_grad()
def test_report_reads_well_and_is_json() -> None:
    model, inputs = llava(), batch(Row(1, 3, 5, 0), Row(0, 2, 9, 2))
    with vtprune.prune(model, vtprune.FastV(layer=2), 0.6) as session:
        model(**inputs)
        report = session.report
    text = report.summary()
    assert "sample 0: 16 visual tokens, 9.5 a layer on average (layers 0-1: 16, 2-3: 3)" in text
    assert "sample 1: 0 visual tokens" in text
    assert f"KV cache bytes: {report.kv_bytes:,} of {report.kv_bytes_full:,}" in text
    assert str(report) == text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["tokens_per_layer"][0] == [16, 16, 3, 3]
    assert data["kept"][0]["site"] == "layer[2]"
    assert data["kept"][0]["indices"][0] == report.kept[0].indices[0].tolist()
    assert report.text_tokens == (10, 11)
    assert len(report.tokens_per_layer[0]) == LAYERS


def test_methods_and_families_are_listed_with_one_line() -> None:
    baselines, published = {"random", "uniform", "pool"}, {"fastv", "divprune", "gemfilter", "transprune"}
    published |= {"fastervlm", "vispruner", "visionzip", "cdpruner", "pyramiddrop", "holov", "dart", "sparsevlm"}
    published |= {"prumerge", "prumerge-plus", "hiprune", "scope", "spatten", "tome"}
    baselines, published = baselines | {"uniform-frames"}, published | {"evs", "vidcom2"}
    assert set(vtprune.methods()) == baselines | published | {"flowcut", "flowcut-text", "atp", "dyvte", "relevance"}
    for summary in (*vtprune.methods().values(), *(info.summary for info in vtprune.families().values())):
        assert summary
        assert "\n" not in summary
    with pytest.raises(AttributeError, match="no attribute 'Fastv'"):
        _ = vtprune.Fastv


def test_newline_tokens_cover_no_pixels_and_frames_are_told_apart() -> None:
    ids = torch.full((1, 8), 99)
    grids = (ImageGrid(2, 3, newline=True), ImageGrid(1, 2, frame=4))
    layout = Layout.from_images(ids == 99, ids == 99, [[grids]])
    assert layout.box(0, 0) == (0, None, (0.0, 0.0, 0.5, 0.5))
    assert layout.box(0, 2) is None
    assert layout.box(0, 5) is None
    assert layout.box(0, 7) == (0, 4, (0.5, 0.0, 1.0, 1.0))
